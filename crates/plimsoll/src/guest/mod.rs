//! `plimsoll guest`: what a machine's own devices can do about its memory, and having them do it.
//!
//! Enters: which machine, and what its guest is to have. Leaves: a description, or a balloon or hot memory that was brought to where it
//! was wanted, as far as the guest goes along. The guest is asked, never forced, so a wish may fall short: that is said, with
//! status 1. What must never happen: a wish sent that the machine cannot fulfil, or a wait for a guest without an end.
//!
//! [`show`]: what there is. [`balloon`] and [`plug`]: the two wishes. [`view`]: what is printed.
mod balloon;
mod plug;
mod show;
mod view;

use crate::demo::Interrupt;
use crate::verb::ended;
use plimsoll_attach::control::Control;
use plimsoll_attach::{Held, Refusal, Request, find, inspect, join};
use plimsoll_linux::explain;
use plimsoll_sys::pidfd::Liveness;
use plimsoll_types::ByteCount;
use plug::Wish;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use view::View;

/// Between two looks: what the balloon's controller is made for.
const PERIOD: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub(crate) struct GuestArgs {
    /// The machine: its process id, its name or its UUID.
    machine: String,
    /// A QMP socket of the machine's that nobody else uses. A machine of libvirt's is asked through virsh without.
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    /// The API socket of Cloud Hypervisor or Firecracker, instead of the one its command line names.
    #[arg(long, value_name = "SOCKET")]
    api: Option<PathBuf>,
    /// Bring the balloon to where the guest has that much of the memory it was started with, within 1 %.
    #[arg(long, value_name = "SIZE", conflicts_with = "plug")]
    balloon: Option<ByteCount>,
    /// Plug or unplug hot memory until there is that much of it. ID names a piece where there are several.
    #[arg(long, value_name = "[ID=]SIZE")]
    plug: Option<Wish>,
    /// Have the guest tell its statistics this often from now on. With --balloon it does so every second meanwhile anyway.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    statistics: Option<u32>,
    /// JSON instead of text; with a wish, one object a line.
    #[arg(long)]
    json: bool,
}

/// How a wish ended, in a sentence.
enum End {
    /// As wished.
    There(String),
    /// Otherwise, with nothing left to wait for.
    Short(String),
}

pub(crate) fn main(args: &GuestArgs) -> ExitCode {
    ended("guest", run(args))
}

fn run(args: &GuestArgs) -> Result<ExitCode, String> {
    let machine = find(&args.machine).map_err(refused)?.identity;
    let held = Held::reopen(machine.process, machine.start).map_err(refused)?;
    let request = Request { ranges: Vec::new(), qmp: args.qmp.clone(), api: args.api.clone() };
    let dossier = inspect(&held, &request).map_err(refused)?;
    let control = join(&held, &dossier, &request);
    let control =
        control.map_err(|error| format!("{} cannot be asked: {}", dossier.name, explain(&error)))?;
    let mut guest = Guest { held, control, interrupt: Interrupt::install()? };
    let every = args.statistics.map(|seconds| Duration::from_secs(seconds.into()));
    let view = View::new(args.json);
    let end = match (args.balloon, &args.plug) {
        (Some(size), _) => balloon::bring(&mut guest, size, every, &view)?,
        (None, wish) => {
            if let Some(every) = every {
                show::have_told(&mut guest, every)?;
            }
            let Some(wish) = wish else {
                view.description(&dossier, &show::look(&mut *guest.control)?);
                return Ok(ExitCode::SUCCESS);
            };
            plug::bring(&mut guest, wish, &view)?
        }
    };
    view.end(&end);
    Ok(match end {
        End::There(_) => ExitCode::SUCCESS,
        End::Short(_) => ExitCode::FAILURE,
    })
}

/// A machine and whoever speaks to it.
struct Guest {
    held: Held,
    control: Box<dyn Control>,
    interrupt: Interrupt,
}

impl Guest {
    /// Waits until the moment, or fails when the machine ends before or a signal asks for the end.
    fn wait_until(&self, moment: Instant) -> Result<(), String> {
        let left = moment.saturating_duration_since(Instant::now());
        match self.held.pidfd().wait_exit(left) {
            Ok(Liveness::Alive) if self.interrupt.is_set() => {
                Err("a signal asked for the end; what the guest was asked for last stands".to_owned())
            }
            Ok(Liveness::Alive) => Ok(()),
            Ok(Liveness::Exited) => Err("the machine has ended".to_owned()),
            Err(error) => Err(explain(&error)),
        }
    }
}

/// Tells when something has not changed for too long.
struct Patience<T> {
    last: Option<T>,
    since: Instant,
}

impl<T: PartialEq> Patience<T> {
    fn new() -> Self {
        Self { last: None, since: Instant::now() }
    }

    /// Notes what there is at `now`; true when it was the same for `limit`.
    fn is_over(&mut self, found: T, now: Instant, limit: Duration) -> bool {
        if self.last.as_ref() != Some(&found) {
            (self.last, self.since) = (Some(found), now);
        }
        now.saturating_duration_since(self.since) >= limit
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is what map_err gives")]
fn refused(refusal: Refusal) -> String {
    explain(&refusal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_ends_when_nothing_has_changed_for_long_and_begins_anew_with_each_change() {
        let limit = Duration::from_secs(20);
        let mut patience = Patience::new();
        let start = Instant::now();
        let mut is_over = |found, second| patience.is_over(found, start + Duration::from_secs(second), limit);
        assert!(!is_over(1, 0));
        assert!(!is_over(1, 19));
        assert!(!is_over(2, 21));
        assert!(!is_over(2, 40));
        assert!(is_over(2, 41));
    }
}
