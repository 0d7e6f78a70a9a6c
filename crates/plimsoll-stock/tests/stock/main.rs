//! Stock Linux guests, started, damaged, paged out and moved. Each test owns its guests.
#![expect(clippy::unwrap_used, reason = "what helpers of tests unwrap is what the tests are about")]
mod boot;
mod common;
mod damage;
mod machine;
mod migrate;
mod pageout;
