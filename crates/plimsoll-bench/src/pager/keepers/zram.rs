//! The kernel: an unmanaged guest's pages go to a new zram device on request, and come back when they are touched.
use super::{Keeper, Taken, check_away};
use crate::guest::Guest;
use crate::pager::Scene;
use crate::session::{BenchError, timed};
use crate::swap::device;
use anyhow::{Context, anyhow};
use plimsoll_linux::zram::ZramSwap;
use plimsoll_sys::process_memory::{self, Advice};
use plimsoll_types::ByteCount;
use plimsoll_vmm::VmmConfig;

/// The device is made for twice the pages, so that the search for a free slot is never what takes the time.
const ROOM: u64 = 2;
/// How often pages that stayed are asked to go again, not timed.
const PASSES_MAX: usize = 20;
/// The first pass, which is timed, must take this share of the pages to stand for all of them.
const FIRST_PASS_PERCENT_MIN: usize = 95;

/// An unmanaged guest and the device its pages go to. The guest ends first: removing the device would read its pages
/// back.
pub(crate) struct Zram {
    guest: Guest,
    _device: ZramSwap,
}

impl Keeper for Zram {
    fn start(config: &VmmConfig, scene: &Scene<'_>) -> Result<Self, BenchError> {
        let device = device(ByteCount(config.ram_bytes * ROOM)).context("cannot make a zram device")?;
        let guest = Guest::unmanaged(config.clone(), scene.interrupt)?;
        Ok(Self { guest, _device: device })
    }

    fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }

    fn page_out(&mut self) -> Result<Taken, BenchError> {
        let guest = &self.guest;
        let ram = guest.ram();
        let page_out = || process_memory::advise(guest.process(), &ram, Advice::PageOut);
        let before = guest.present()?;
        let (transfer, elapsed) = timed(page_out);
        if let Some(refusal) = transfer.stop {
            return Err(anyhow!(refusal).context("the kernel refused MADV_PAGEOUT").into());
        }
        let went = before.saturating_sub(guest.present()?);
        if went * 100 < before * FIRST_PASS_PERCENT_MIN {
            let why = anyhow!(
                "MADV_PAGEOUT took {went} of {before} pages: its time does not stand for all of them"
            );
            return Err(why.into());
        }
        for _ in 0..PASSES_MAX {
            if check_away("zram", guest).is_ok() {
                break;
            }
            let _ = page_out();
        }
        check_away("zram", guest)?;
        Ok(Taken { pages: went as u64, seconds: elapsed.seconds, cpu_seconds: elapsed.cpu_seconds })
    }
}
