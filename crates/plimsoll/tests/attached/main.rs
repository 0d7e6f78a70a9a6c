//! `plimsoll attach`, `plimsoll manage`, `plimsoll guest`, the tools that see through both stages, and `plimsoll demo --linux` over stock Linux guests in an unmodified QEMU, which verify what they read.
#![expect(clippy::unwrap_used, reason = "what helpers of tests unwrap is what the tests are about")]
mod attach;
mod audit;
mod cooperation;
mod demo;
mod dump;
mod hinting;
mod liar;
#[path = "../../../plimsoll-stock/tests/stock/machine.rs"]
mod machine;
mod manage;
mod manager;
mod maps;
mod migration;
mod plug;
mod share;
mod snapshot;
mod splinter;
mod translate;
