//! The store against the kernel's swapping to zram: the same pages, one thread.
//!
//! Enters: nothing but the machine. Leaves: four ratios for each kind of content. Both sides start from the same pages in
//! an anonymous mapping of 4 KiB pages, and from an empty store or a new device; both are read back and compared with what
//! went in, outside of the timed parts. What must never happen: pages counted that did not go.
//!
//! **What is not compared.** Ours is the store alone: the pager's move of a page out of the guest (UFFDIO_MOVE), its
//! bookkeeping and the way back into the guest are left out, while the kernel's numbers are the whole way. So the rows
//! are called `store-put` and `store-get`, not capture and refault, and have no goal.
mod ours;
mod peer;

use crate::contents::{MIX, NO_DUPLICATE, NO_ZERO_NO_DUPLICATE, POOL_PAGES, RANDOM, SEED};
use crate::figures::float;
use crate::report::{Better, Comparison, Machine, Report, Run, Sample, Subject};
use crate::session::{BenchError, Elapsed, Interrupt, OneProcessor};
use crate::swap::check_host;
use anyhow::{Context, Result, bail};
use plimsoll_guest::PAGE_WORDS;
use plimsoll_guest::content::{Content, Mix};
use plimsoll_sys::mapping::{AnonymousMapping, HugePages};
use plimsoll_types::{ByteCount, PAGE_SIZE, PageBytes};
use serde::Serialize;

/// Large against the processor's caches, small against the memory of any host.
const SIZE: ByteCount = ByteCount::mib(64);
/// Odd, so that the median of ours is a measurement.
const ROUNDS: usize = 7;
/// Rounds before those, not counted: they bring code, page tables and the kernel's caches into their usual state.
const ROUNDS_TO_WARM: usize = 1;

const NOTES: [&str; 6] = [
    "store-put leaves out the capture (UFFDIO_MOVE) and the bookkeeping that our pager also does: it is the store \
     alone, not the whole pager; the peer's number is MADV_PAGEOUT whole",
    "store-get leaves out the fault and putting the page into the guest; the peer's number is the whole touch, in order",
    "bytes-held counts slabs and metadata on our side and zram's mem_used_total on the peer's; neither counts the table \
     with an entry for each page (our page words, zram's table and the swap map)",
    "bytes-held-cold is bytes-held after all pages that can be were packed densely (zstd), which a running manager does \
     to what has been cold for a minute; the peer's zram has no such second step set up",
    "both sides start from 4 KiB pages (no transparent huge pages)",
    "CPU is user and system time of the one thread; zram compresses in it",
];

/// A kind of content and what the bytes it takes once it is cold must reach against zram.
struct Row {
    name: &'static str,
    mix: Mix,
    bytes_goal: Option<f64>,
}

impl Row {
    fn names(&self) -> [String; 4] {
        ["store-put", "bytes-held", "bytes-held-cold", "store-get"]
            .map(|what| format!("{what}/{}", self.name))
    }
}

/// The goals for bytes are those of the whole product on the same content.
fn rows() -> [Row; 4] {
    [
        Row { name: "mix", mix: MIX, bytes_goal: Some(0.65) },
        Row { name: "no-duplicate", mix: NO_DUPLICATE, bytes_goal: Some(0.9) },
        Row { name: "no-zero-no-duplicate", mix: NO_ZERO_NO_DUPLICATE, bytes_goal: None },
        Row { name: "random", mix: RANDOM, bytes_goal: None },
    ]
}

/// What to repeat the benchmark with.
#[derive(Debug, Serialize)]
struct Settings {
    pages: usize,
    rounds: usize,
    threads: usize,
    seed: u64,
    pool_pages: u64,
    peer: &'static str,
    content: Vec<String>,
}

/// What one side did with the pages.
struct Outcome {
    put: Sample,
    held: Sample,
    /// Once all pages are cold.
    held_cold: Sample,
    get: Sample,
}

impl Outcome {
    /// `put` and `get` of so many pages each, which took `held` bytes, and `held_cold` in the end.
    fn new(
        put: (usize, Elapsed),
        held: ByteCount,
        held_cold: (ByteCount, Option<Elapsed>),
        get: (usize, Elapsed),
    ) -> Self {
        let per_second = |(pages, elapsed): (usize, Elapsed)| Sample {
            value: float(pages as u64) / elapsed.seconds,
            cpu_seconds: Some(elapsed.cpu_seconds),
        };
        let per_page = |bytes: ByteCount, elapsed: Option<Elapsed>| Sample {
            value: float(bytes.0) / float(get.0 as u64),
            cpu_seconds: elapsed.map(|elapsed| elapsed.cpu_seconds),
        };
        Self {
            put: per_second(put),
            held: per_page(held, None),
            held_cold: per_page(held_cold.0, held_cold.1),
            get: per_second(get),
        }
    }
}

/// Measures the rows whose names begin so.
pub(crate) fn run(prefix: &str, interrupt: &Interrupt) -> Result<Report, BenchError> {
    check_host()?;
    // Before pinning, after which one processor is all that this thread sees.
    let machine = Machine::here();
    let _processor = OneProcessor::here()?;
    let rows = rows();
    let pages = usize::try_from(SIZE.pages_floor().0).context("this many pages cannot be addressed")?;
    println!(
        "store against MADV_PAGEOUT to zram (lz4): {pages} pages, one thread, {ROUNDS} rounds of peer, ours, peer"
    );
    println!("{machine}");
    NOTES.iter().for_each(|note| println!("note: {note}"));
    let mut results = Vec::new();
    for row in rows.iter().filter(|row| row.names().iter().any(|name| name.starts_with(prefix))) {
        let content = Content::new(SEED, SEED, POOL_PAGES, row.mix).context("bad mix")?;
        let source = source(&content, pages);
        println!("content {}: {}", row.name, row.mix);
        let compared = measure(row, &source, interrupt)?.into_iter();
        for comparison in compared.filter(|comparison| comparison.name().starts_with(prefix)) {
            println!("  {comparison}");
            results.push(comparison);
        }
    }
    let settings = Settings {
        pages,
        rounds: ROUNDS,
        threads: 1,
        seed: SEED,
        pool_pages: POOL_PAGES,
        peer: "MADV_PAGEOUT to zram, lz4",
        content: rows.iter().map(|row| format!("{}: {}", row.name, row.mix)).collect(),
    };
    Ok(Report::new(machine, &settings, &NOTES, results)?)
}

/// All rounds of one kind of content.
fn measure(row: &Row, source: &[PageBytes], interrupt: &Interrupt) -> Result<[Comparison; 4], BenchError> {
    let (mut put, mut held, mut held_cold, mut get) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS_TO_WARM + ROUNDS {
        interrupt.check()?;
        let before = peer::run(source)?;
        interrupt.check()?;
        let ours = ours::run(source)?;
        interrupt.check()?;
        let after = peer::run(source)?;
        if round < ROUNDS_TO_WARM {
            continue;
        }
        let run =
            |of: fn(&Outcome) -> Sample| Run { ours: of(&ours), peer: of(&before), peer_again: of(&after) };
        put.push(run(|outcome| outcome.put));
        held.push(run(|outcome| outcome.held));
        held_cold.push(run(|outcome| outcome.held_cold));
        get.push(run(|outcome| outcome.get));
    }
    let compare =
        |name, unit, better, goal, runs| Comparison::new(Subject { name, unit, better, goal }, runs);
    let [put_name, held_name, cold_name, get_name] = row.names();
    Ok([
        compare(put_name, "pages/s", Better::Higher, None, put)?,
        compare(held_name, "bytes/page", Better::Lower, None, held)?,
        compare(cold_name, "bytes/page", Better::Lower, row.bytes_goal, held_cold)?,
        compare(get_name, "pages/s", Better::Higher, None, get)?,
    ])
}

/// The pages as they must be. Version 0 would be a page never written.
fn source(content: &Content, pages: usize) -> Vec<PageBytes> {
    let page = |number| {
        let (mut words, mut bytes) = ([0; PAGE_WORDS], [0; PAGE_SIZE]);
        content.fill(number, 1, &mut words);
        for (word, place) in words.iter().zip(bytes.as_chunks_mut().0) {
            *place = word.to_le_bytes();
        }
        bytes
    };
    (0..pages as u64).map(page).collect()
}

/// Memory with these pages in it, each present and private, zero pages too.
fn filled(source: &[PageBytes]) -> Result<AnonymousMapping> {
    let bytes = source.as_flattened();
    let memory = AnonymousMapping::new(ByteCount(bytes.len() as u64), HugePages::Never)?;
    memory.copy_into(ByteCount(0), bytes)?;
    Ok(memory)
}

/// Where a page lies in its mapping.
const fn offset(page: usize) -> ByteCount {
    ByteCount((page * PAGE_SIZE) as u64)
}

/// An error where a page came back as something else.
fn check(side: &str, page: usize, found: &PageBytes, expected: &PageBytes) -> Result<()> {
    if found != expected {
        bail!("{side} returned wrong bytes for page {page}: the numbers mean nothing");
    }
    Ok(())
}
