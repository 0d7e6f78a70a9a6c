//! The peer: the kernel swaps the same pages out to zram on request, and back in when they are touched.
//!
//! Enters: pages. Leaves: how fast they went and came back, and what zram took for them. What must never happen: a device
//! left behind.
use super::{Outcome, check, filled, offset};
use crate::session::timed;
use crate::swap::device;
use anyhow::{Context, Result, bail};
use plimsoll_linux::zram::ZramSwap;
use plimsoll_sys::ProcessId;
use plimsoll_sys::mapping::AnonymousMapping;
use plimsoll_sys::pagemap::{Entry, Pagemap};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::process_memory::{self, Advice};
use plimsoll_types::{ByteCount, PAGE_SIZE, PageBytes};
use std::hint::black_box;

/// The device is made for twice the pages, so that the search for a free slot is never what takes the time.
const ROOM: u64 = 2;
/// How often pages that stayed are asked to go again, not timed.
const PASSES_MAX: usize = 20;
/// The first pass, which is timed, must take this share of the pages to stand for all of them.
const FIRST_PASS_PERCENT_MIN: usize = 95;

/// One run, on a new device.
pub(super) fn run(source: &[PageBytes]) -> Result<Outcome> {
    let memory = filled(source)?;
    let device = device(ByteCount(memory.len().0 * ROOM))?;
    let outcome = swap(source, &memory, &device);
    // The pages go first, so that removing the device has nothing to read back.
    drop(memory);
    device.remove()?;
    outcome
}

fn swap(source: &[PageBytes], memory: &AnonymousMapping, device: &ZramSwap) -> Result<Outcome> {
    let this = Pidfd::open(ProcessId::own())?;
    let pages = source.len();
    let at_first = device.memory_used()?;
    let page_out = || process_memory::advise(&this, &[memory.range()], Advice::PageOut);
    let (transfer, put) = timed(page_out);
    if let Some(refusal) = transfer.stop {
        return Err(refusal).context("the kernel refused MADV_PAGEOUT");
    }
    let went = swapped(memory)?;
    if went * 100 < pages * FIRST_PASS_PERCENT_MIN {
        bail!("MADV_PAGEOUT took {went} of {pages} pages: its time does not stand for all of them");
    }
    let mut out = went;
    for _ in 0..PASSES_MAX {
        if out == pages {
            break;
        }
        let _ = page_out();
        out = swapped(memory)?;
    }
    if out < pages {
        bail!("{} of {pages} pages cannot be paged out: what zram holds is not all of them", pages - out);
    }
    let held = device.memory_used()?.saturating_sub(at_first);
    let (touched, get) = timed(|| touch_all(memory, pages));
    touched?;
    let mut page = [0; PAGE_SIZE];
    for (place, expected) in source.iter().enumerate() {
        memory.copy_from(offset(place), &mut page)?;
        check("the kernel", place, &page, expected)?;
    }
    Ok(Outcome::new((went, put), held, (held, None), (pages, get)))
}

/// Reads a word of each page, in order.
fn touch_all(memory: &AnonymousMapping, pages: usize) -> Result<()> {
    for page in 0..pages {
        black_box(memory.read_u64(offset(page))?);
    }
    Ok(())
}

/// How many pages are in swap and not in memory.
fn swapped(memory: &AnonymousMapping) -> Result<usize> {
    let mut entries = Vec::new();
    Pagemap::open(ProcessId::own())?.read(memory.range(), &mut entries)?;
    let is_out = |entry: &&Entry| entry.contains(Entry::SWAPPED) && !entry.contains(Entry::PRESENT);
    Ok(entries.iter().filter(is_out).count())
}
