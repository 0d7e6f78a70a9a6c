//! One piece of work on page tables, by this crate or by a peer, for a simulator to count its instructions.
//!
//! Enters: whose work, which, and the size of the pages, on the command line. Leaves: nothing; what [`measured`] does is what counts.
//! `cargo xtask bench mmu` runs it under callgrind. All tables come from a pool of zeroed frames, all map 1 GiB that begins at 2 MiB, and
//! a check after the work, outside of what counts, makes sure that it was done.
mod ours;
mod peers;

use std::process::ExitCode;

/// Where the memory that is mapped begins, before and after translation: aligned to 2 MiB and no more, so that nobody maps 1 GiB at once.
const FIRST: u64 = 0x20_0000;
const OUTPUT: u64 = 0x1_0020_0000;
const BYTES: u64 = 1 << 30;
/// Tables of the lowest level for 1 GiB that lies across a border of 1 GiB, those above them, and the root.
const FRAMES: usize = 513 + 2 + 1 + 8;

/// What is done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    /// The range is mapped in empty tables.
    Map,
    /// The range, which is all there is, is unmapped.
    Unmap,
    /// All translations of the range are gone through, by whatever goes through most of it at once: where a page goes, its size, its
    /// leaf's word.
    Walk,
    /// The same, and what all entries on the way permit, by whoever knows.
    WalkRights,
    /// Each page of the range is looked up by itself: the same as for `Walk`.
    LookUp,
    /// And what all entries on the way permit.
    LookUpRights,
}

/// What counts.
#[inline(never)]
fn measured<T>(work: impl FnOnce() -> T) -> T {
    work()
}

/// The first addresses of all pages of the range.
fn pages(shift: u32) -> impl Iterator<Item = u64> {
    (FIRST..FIRST + BYTES).step_by(1 << shift)
}

/// What the addresses are that they go to, added up.
fn outputs(shift: u32) -> u64 {
    pages(shift).map(|page| page - FIRST + OUTPUT).sum()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [who, work, shift] = words[..] else { return usage() };
    let work = match work {
        "map" => Work::Map,
        "unmap" => Work::Unmap,
        "walk" => Work::Walk,
        "look-up" => Work::LookUp,
        "walk-rights" => Work::WalkRights,
        "look-up-rights" => Work::LookUpRights,
        _ => return usage(),
    };
    let shift = match shift {
        "4KiB" => 12,
        "2MiB" => 21,
        _ => return usage(),
    };
    let run: fn(Work, u32) = match who {
        "ours-x86" => ours::x86,
        "ours-arm" => ours::arm,
        "ours-one-stage" => ours::one_stage,
        "ours-two-stages" => ours::two_stages,
        "x86_64" => peers::x86_64,
        "aarch64-paging" => peers::aarch64_paging,
        _ => return usage(),
    };
    run(work, shift);
    ExitCode::SUCCESS
}

fn usage() -> ExitCode {
    eprintln!(
        "count WHO map|unmap|walk|walk-rights|look-up|look-up-rights 4KiB|2MiB; see `cargo xtask bench mmu`"
    );
    ExitCode::from(1)
}
