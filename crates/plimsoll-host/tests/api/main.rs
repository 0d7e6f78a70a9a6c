//! The API over a real control loop, whose machines are made of numbers.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod certificates;
mod estate;
mod limits;
mod outside;
mod reload;
mod remote;
mod requests;
mod scale;
mod slow;
