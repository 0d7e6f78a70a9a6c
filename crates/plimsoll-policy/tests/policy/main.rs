//! The policy as its users see it: views in, plans out.
//!
//! * `world`: a host that does what it is told, to close the loop.
//! * `invariants`: what holds of every plan, over random hosts with hostile numbers.
//! * `limits`: what goes because it is above one, and who of a group gives it.
//! * `loops`: what comes of many decisions.
//! * `swings`: targets move back and forth only where nobody else can give way.
//! * `manual`: one machine or two, and the decision a manual would describe.
//! * `refusals`: contradictions in settings.
//! * `cost`: how long a decision takes.
#![expect(clippy::unwrap_used, reason = "what is missing is a failure of the test")]
mod cost;
mod invariants;
mod limits;
mod loops;
mod manual;
mod refusals;
mod swings;
mod world;
