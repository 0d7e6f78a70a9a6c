//! Chaos: guests under a daemon whose manager is killed, built for speed and then run.
//!
//! Enters: what the command line said. Leaves: nothing but an error, because the program takes this one's place: so signals reach
//! it, which has processes to end, and its exit status is what the caller sees.
use crate::cargo;
use anyhow::Result;
use std::convert::Infallible;

/// How much.
#[derive(clap::Args)]
pub(crate) struct Choice {
    /// How often the manager is killed.
    #[arg(long, default_value_t = 500)]
    kills: u64,
    /// How many guests run.
    #[arg(long, default_value_t = 8)]
    guests: u32,
    /// Has the disk tier on a disk that has no room or refuses writes at random instants; what it is depends on the seed.
    #[arg(long)]
    bad_disk: bool,
    /// Repeats the choices of an earlier run.
    #[arg(long)]
    seed: Option<u64>,
}

/// Builds the program and becomes it.
pub(crate) fn run(choice: &Choice) -> Result<Infallible> {
    cargo::become_program("plimsoll", |command, _| {
        command.arg("soak").arg("--kill-daemon").arg(choice.kills.to_string());
        command.arg("--guests").arg(choice.guests.to_string());
        if choice.bad_disk {
            command.arg("--bad-disk");
        }
        if let Some(seed) = choice.seed {
            command.arg("--seed").arg(seed.to_string());
        }
    })
}
