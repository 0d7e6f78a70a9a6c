//! The program as a user starts it: what it says, how it ends, what it leaves.
//!
//! One test program, so that no two of its tests run guests at the same time.
#![expect(clippy::unwrap_used, reason = "a step that cannot be taken fails the test")]

mod api;
mod attach;
#[path = "../../../../xtask/src/dist/booted.rs"]
mod booted;
#[path = "../../../plimsoll-host/tests/api/certificates.rs"]
mod certificates;
mod churn;
mod config;
mod daemon;
mod dashboard;
mod demo;
mod host;
mod inspect;
mod metal;
mod plan;
mod remote;
mod rights;
#[expect(dead_code, reason = "the soak and the loops use the rest")]
mod run;
mod service;
mod store;
mod top;
mod upgrade;
