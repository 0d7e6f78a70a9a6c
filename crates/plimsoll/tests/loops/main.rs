//! The control loop over real machines: KVM guests of our own under a budget, and what they cost.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod fleet;
mod overhead;
mod pressure;
#[path = "../cli/run.rs"]
#[expect(dead_code, reason = "these tests use a part of it")]
mod run;
mod three_hosts;
