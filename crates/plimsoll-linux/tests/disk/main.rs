//! The disk tier over a disk that fails on purpose, and over a real file.
#![expect(clippy::unwrap_used, reason = "a step that cannot be taken fails its test")]
mod behaviour;
mod faulty;
mod file;
mod oracle;
mod queued;
mod reading;
mod secret;
mod world;
