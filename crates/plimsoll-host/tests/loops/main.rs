//! The control loop over back ends that do what they are told, or do not.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod cooperation;
mod fake;
mod plugging;
mod record;
mod turns;
