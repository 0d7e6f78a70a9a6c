//! Three ways to keep a guest's pages elsewhere: the pager, the kernel's swapping to zram, a bare userfaultfd loop.
//!
//! What must never happen: a keeper that says a guest's pages are away while they are in memory. Each looks at the page
//! map before it says so.
mod bare;
mod ours;
mod zram;

pub(super) use bare::Bare;
pub(crate) use ours::{MEMBERSHIP, Managed, Ours, Running};
pub(super) use zram::Zram;

use super::Scene;
use crate::guest::Guest;
use crate::session::BenchError;
use anyhow::{Result, anyhow};
use plimsoll_vmm::VmmConfig;

/// Pages that may stay: the pager's floor, what the VMM has pinned, and what waits in lists of another processor.
const STAY_MAX: usize = 192;

/// What taking a guest's pages came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    /// Pages that went.
    pub(super) pages: u64,
    /// How long it took.
    pub(super) seconds: f64,
    /// What this process and the guest's worked for it.
    pub(super) cpu_seconds: f64,
}

/// A guest whose pages can be taken.
pub(super) trait Keeper: Sized {
    /// Starts a guest.
    fn start(config: &VmmConfig, scene: &Scene<'_>) -> Result<Self, BenchError>;
    /// The guest.
    fn guest(&mut self) -> &mut Guest;
    /// Takes all its pages, while it does nothing.
    fn page_out(&mut self) -> Result<Taken, BenchError>;
}

/// An error where more pages are in memory than must be.
fn check_away(side: &str, guest: &Guest) -> Result<()> {
    match guest.present()? {
        0..=STAY_MAX => Ok(()),
        stayed => Err(anyhow!("{side}: {stayed} pages of a guest are still in memory")),
    }
}
