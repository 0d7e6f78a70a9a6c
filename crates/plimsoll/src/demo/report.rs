//! What the demo found, as a value: the text a person reads and the JSON a program reads are two views of it.
//!
//! The JSON schema is described in docs/demo-report.md; a field is never renamed, only added.
use plimsoll_core::word::StateKind;
use plimsoll_linux::uffd::manager::MachineView;
use plimsoll_types::{ByteCount, PAGE_SIZE, PageCount};
use serde::Serialize;
use std::fmt::Write;

/// Allowed above the budget: what the kernel needs to hand a page over while the last one is not yet back.
const TOLERANCE_PERCENT: u64 = 2;

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    /// Of this schema.
    pub(crate) version: u32,
    pub(crate) guests_are: String,
    pub(crate) run_by: String,
    pub(crate) seed: u64,
    pub(crate) mix: String,
    pub(crate) seconds: u64,
    pub(crate) asked_bytes: u64,
    pub(crate) budget_bytes: u64,
    pub(crate) peak_bytes: u64,
    pub(crate) peak_source: String,
    pub(crate) wrong_words: u64,
    pub(crate) poisoned_pages: u64,
    pub(crate) host: HostReport,
    pub(crate) guests: Vec<GuestReport>,
    /// What leaving for the hypervisor costs one kernel with each kind of paging, where that was counted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) modes: Vec<ModeReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) without: Option<Without>,
    /// Why there is no comparison.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) no_comparison: Option<String>,
    /// Everything that went wrong; empty when the run passed.
    pub(crate) failures: Vec<String>,
}

/// Exits of the same kernel with one kind of paging.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ModeReport {
    pub(crate) paging: String,
    pub(crate) exits: u64,
    pub(crate) instructions: u64,
    pub(crate) exits_per_million: u64,
}

/// Pages and bytes of the whole host at the end of the run, before the guests' last check.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct HostReport {
    pub(crate) resident_bytes: u64,
    pub(crate) limbo_bytes: u64,
    pub(crate) store_bytes: u64,
    pub(crate) tables_bytes: u64,
    pub(crate) overhead_bytes: u64,
    /// Pages out of RAM that read as zeros and are kept nowhere.
    pub(crate) saved_zero_bytes: u64,
    /// Pages out of RAM that are kept once for several.
    pub(crate) saved_duplicate_bytes: u64,
    /// What compression took off the others.
    pub(crate) saved_compression_bytes: u64,
    pub(crate) stored_pages: u64,
    pub(crate) store_metadata_bytes: u64,
    /// Page words and bookkeeping beside them.
    pub(crate) bookkeeping_bytes: u64,
    /// Stored pages that are packed densely because they were cold.
    pub(crate) packed_pages: u64,
    /// Share of the store's data slabs that holds no byte of a page, in thousandths.
    pub(crate) store_fragmentation_permille: u64,
    /// Stored pages that resemble another one, estimated from a sample.
    pub(crate) near_duplicate_pages: u64,
    /// Pages brought back before they were touched, and how many of them at most went to the store again unused.
    pub(crate) brought_ahead_pages: u64,
    pub(crate) brought_in_vain_pages: u64,
    /// Blocks of 2 MiB left to the kernel, taken as one huge page, brought back as one, made huge again.
    pub(crate) blocks_left_to_kernel: u64,
    pub(crate) blocks_taken_whole: u64,
    pub(crate) blocks_returned_whole: u64,
    pub(crate) blocks_collapsed: u64,
    /// CPU time of the thread that packs, compacts and collapses.
    pub(crate) housekeeping_cpu_seconds: f64,
    /// Pages in use that are kept once for several, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sharing: Option<SharingReport>,
}

/// What sharing pages in use brought and cost.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SharingReport {
    /// On the whole host.
    pub(crate) saved_bytes: u64,
    /// By this run.
    pub(crate) merged_bytes: u64,
    /// Blocks of 2 MiB that are marked for KSM, of all that guests have; and those their VMMs did not mark.
    pub(crate) marked_blocks: u64,
    pub(crate) blocks: u64,
    pub(crate) refused_blocks: u64,
    /// Of KSM's thread, and of looking for twins.
    pub(crate) ksmd_cpu_seconds: f64,
    pub(crate) looking_cpu_seconds: f64,
    /// Both together; null where nothing was merged.
    pub(crate) us_a_merged_page: Option<f64>,
    /// Why everything was unmerged meanwhile, the last time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hindered: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct GuestReport {
    pub(crate) name: String,
    pub(crate) size_bytes: u64,
    pub(crate) resident_bytes: u64,
    pub(crate) limbo_bytes: u64,
    pub(crate) stored_bytes: u64,
    pub(crate) true_working_set_bytes: Option<u64>,
    pub(crate) estimated_working_set_bytes: Option<u64>,
    pub(crate) operations: u64,
    pub(crate) operations_per_second: f64,
    pub(crate) operation_p50_us: f64,
    pub(crate) operation_p99_us: f64,
    pub(crate) faults: u64,
    pub(crate) fault_p50_us: f64,
    pub(crate) fault_p99_us: f64,
    /// Share of its vCPUs' time spent waiting for the pager.
    pub(crate) stall_share: f64,
    pub(crate) captured_pages: u64,
    pub(crate) refused_pages: u64,
    /// Times it left for the hypervisor in a million of its instructions, where they were counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) exits_per_million: Option<u64>,
    pub(crate) anomalies: u64,
    pub(crate) wrong_words: u64,
    pub(crate) died: Option<String>,
}

/// The same guests under the kernel alone.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Without {
    /// What the kernel had to work with.
    pub(crate) swap: String,
    /// The most that the control group and the zram device held together, looked at ten times a second.
    pub(crate) peak_bytes: u64,
    pub(crate) zram_peak_bytes: u64,
    /// Processes the kernel ended because the limit left it no other way.
    pub(crate) oom_kills: u64,
    pub(crate) wrong_words: u64,
    pub(crate) guests: Vec<WithoutGuest>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct WithoutGuest {
    pub(crate) name: String,
    pub(crate) operations_per_second: f64,
    pub(crate) operation_p99_us: f64,
    pub(crate) died: Option<String>,
}

/// The value below which `share` of the operations in ascending buckets lie, in microseconds.
pub(crate) fn quantile_us(buckets: &[(u64, u64)], share: f64) -> f64 {
    let total: u64 = buckets.iter().map(|(_, count)| count).sum();
    let wanted = total as f64 * share;
    let mut seen = 0;
    for (floor_ns, count) in buckets {
        seen += count;
        if seen as f64 >= wanted {
            return *floor_ns as f64 / 1000.0;
        }
    }
    0.0
}

/// Operations a second over the time the workload ran.
pub(crate) fn rate(operations: u64, running_ns: u64) -> f64 {
    if running_ns == 0 { 0.0 } else { operations as f64 * 1e9 / running_ns as f64 }
}

impl HostReport {
    /// What taking pages saved, from the machines' own counts and the store's.
    pub(crate) fn savings(&mut self, machines: &[MachineView], store: &plimsoll_store::Stats) {
        let sum = |count: fn(&MachineView) -> u64| machines.iter().map(count).sum();
        self.brought_ahead_pages = sum(|machine| machine.stats.ahead.brought);
        self.brought_in_vain_pages = sum(|machine| machine.stats.ahead.in_vain);
        self.blocks_left_to_kernel = sum(|machine| machine.stats.blocks.left);
        self.blocks_taken_whole = sum(|machine| machine.stats.blocks.taken);
        self.blocks_returned_whole = sum(|machine| machine.stats.blocks.returned);
        self.packed_pages = store.dense.0;
        self.store_fragmentation_permille = store.fragmentation().per_mille();
        self.near_duplicate_pages = store.near_duplicate.0;
        let page = PAGE_SIZE as u64;
        // A page that was dropped as zero and has not been touched since is in state zero, with those never touched:
        // those dropped are what this run saved.
        let zero: u64 = machines.iter().map(dropped_zero).sum();
        self.saved_zero_bytes = zero * page;
        self.saved_duplicate_bytes = store.duplicate.0 * page;
        let unique = (store.same.0 + store.lz4.0 + store.dense.0 + store.raw.0) * page;
        self.saved_compression_bytes = unique.saturating_sub(store.data.0);
        self.stored_pages = store.pages.0;
        self.store_metadata_bytes = store.metadata.0;
        let words: u64 = machines.iter().map(|machine| machine.size.pages_floor().0 * 8).sum();
        let beside: u64 = machines.iter().map(|machine| machine.stats.table_bytes as u64).sum();
        self.bookkeeping_bytes = words + beside;
    }
}

fn dropped_zero(machine: &MachineView) -> u64 {
    machine.stats.census.of(StateKind::Zero).0.min(machine.stats.stored.zero)
}

impl Report {
    /// The most the run may have used.
    pub(crate) fn line(&self) -> ByteCount {
        ByteCount(self.budget_bytes + self.budget_bytes / 100 * TOLERANCE_PERCENT)
    }

    /// The tables a person reads.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let bytes = |bytes: u64| ByteCount(bytes).to_string();
        let some = |bytes: Option<u64>| bytes.map_or("-".to_owned(), |bytes| ByteCount(bytes).to_string());
        writeln!(
            out,
            "{:<9} {:>6} {:>9} {:>9} {:>9} {:>9} {:>8} {:>9} {:>9} {:>6} {:>5}",
            "guest",
            "size",
            "resident",
            "stored",
            "true ws",
            "est ws",
            "ops/s",
            "fault p50",
            "p99 us",
            "stall",
            "wrong"
        )?;
        for guest in &self.guests {
            writeln!(
                out,
                "{:<9} {:>6} {:>9} {:>9} {:>9} {:>9} {:>8.0} {:>9.0} {:>9.0} {:>5.1}% {:>5}",
                guest.name,
                bytes(guest.size_bytes),
                bytes(guest.resident_bytes),
                bytes(guest.stored_bytes),
                some(guest.true_working_set_bytes),
                some(guest.estimated_working_set_bytes),
                guest.operations_per_second,
                guest.fault_p50_us,
                guest.fault_p99_us,
                guest.stall_share * 100.0,
                guest.wrong_words,
            )?;
        }
        writeln!(out)?;
        self.write_host(out)?;
        self.write_exits(out)?;
        match (&self.without, &self.no_comparison) {
            (Some(without), _) => self.write_comparison(out, without)?,
            (None, Some(why)) => writeln!(out, "\nnot compared with the kernel alone: {why}")?,
            (None, None) => {}
        }
        writeln!(out)?;
        for failure in &self.failures {
            writeln!(out, "FAILED: {failure}")?;
        }
        if self.failures.is_empty() {
            writeln!(
                out,
                "passed: {} wrong words, peak {:.1} % of the budget",
                self.wrong_words,
                self.peak_bytes as f64 * 100.0 / self.budget_bytes as f64
            )?;
        }
        Ok(())
    }

    fn write_host(&self, out: &mut String) -> std::fmt::Result {
        let bytes = |bytes: u64| ByteCount(bytes).to_string();
        let host = &self.host;
        writeln!(
            out,
            "host: asked {}, budget {}, peak {} ({})",
            bytes(self.asked_bytes),
            bytes(self.budget_bytes),
            bytes(self.peak_bytes),
            self.peak_source
        )?;
        writeln!(
            out,
            "      resident {}, limbo {}, store {} for {} pages, tables {}, overhead {}",
            bytes(host.resident_bytes),
            bytes(host.limbo_bytes),
            bytes(host.store_bytes),
            host.stored_pages,
            bytes(host.tables_bytes),
            bytes(host.overhead_bytes)
        )?;
        writeln!(
            out,
            "      saved: zero pages {}, duplicates {}, compression {}   (content: {})",
            bytes(host.saved_zero_bytes),
            bytes(host.saved_duplicate_bytes),
            bytes(host.saved_compression_bytes),
            self.mix
        )?;
        writeln!(
            out,
            "      bookkeeping {}: {:.2} % of guest memory; store metadata {:.1} bytes a stored page",
            bytes(host.bookkeeping_bytes),
            host.bookkeeping_bytes as f64 * 100.0 / self.asked_bytes as f64,
            host.store_metadata_bytes as f64 / host.stored_pages.max(1) as f64
        )?;
        writeln!(
            out,
            "      {} of them packed with zstd, about {} much like another; {:.1} % of the slabs empty; housekeeping {:.1} s",
            host.packed_pages,
            host.near_duplicate_pages,
            host.store_fragmentation_permille as f64 / 10.0,
            host.housekeeping_cpu_seconds
        )?;
        writeln!(
            out,
            "      {} pages brought ahead, at most {} in vain; blocks: {} left to the kernel, {} taken whole, {} back whole",
            host.brought_ahead_pages,
            host.brought_in_vain_pages,
            host.blocks_left_to_kernel,
            host.blocks_taken_whole,
            host.blocks_returned_whole
        )?;
        let Some(sharing) = &host.sharing else { return Ok(()) };
        let cost = sharing.us_a_merged_page.map_or(String::new(), |us| format!(", {us:.1} us a page"));
        writeln!(
            out,
            "      shared while in use: {} merged, {} of {} blocks marked; ksmd {:.1} s, looking {:.1} s{cost}",
            bytes(sharing.merged_bytes),
            sharing.marked_blocks,
            sharing.blocks,
            sharing.ksmd_cpu_seconds,
            sharing.looking_cpu_seconds
        )?;
        match &sharing.hindered {
            Some(why) => writeln!(out, "      everything was unmerged meanwhile: {why}"),
            None => Ok(()),
        }
    }

    fn write_exits(&self, out: &mut String) -> std::fmt::Result {
        let counted = self
            .guests
            .iter()
            .filter_map(|guest| guest.exits_per_million.map(|exits| format!("{} {exits}", guest.name)));
        let counted: Vec<_> = counted.collect();
        if !counted.is_empty() {
            writeln!(out, "\nexits in a million of the guests' instructions: {}", counted.join(", "))?;
        }
        if self.modes.is_empty() {
            return Ok(());
        }
        writeln!(out, "{:<9} {:>9} {:>14} {:>18}", "paging", "exits", "instructions", "exits per million")?;
        for ModeReport { paging, exits, instructions, exits_per_million } in &self.modes {
            writeln!(out, "{paging:<9} {exits:>9} {instructions:>14} {exits_per_million:>18}")?;
        }
        writeln!(out, "(one kernel that does little but change its address spaces, with the same results)")
    }

    fn write_comparison(&self, out: &mut String, without: &Without) -> std::fmt::Result {
        writeln!(out, "\nthe same guests at the same budget without plimsoll ({}):", without.swap)?;
        writeln!(
            out,
            "{:<9} {:>12} {:>12} {:>14} {:>14}",
            "guest", "ops/s", "plimsoll", "op p99 us", "plimsoll"
        )?;
        for (guest, ours) in without.guests.iter().zip(&self.guests) {
            let died = guest.died.as_deref().map_or(String::new(), |why| format!("  died: {why}"));
            writeln!(
                out,
                "{:<9} {:>12.0} {:>12.0} {:>14.0} {:>14.0}{died}",
                guest.name,
                guest.operations_per_second,
                ours.operations_per_second,
                guest.operation_p99_us,
                ours.operation_p99_us
            )?;
        }
        writeln!(
            out,
            "peak {}, of which zram at most {}; {} guests killed for want of memory; {} wrong words",
            ByteCount(without.peak_bytes),
            ByteCount(without.zram_peak_bytes),
            without.oom_kills,
            without.wrong_words
        )
    }
}

/// The text of a page count as bytes.
pub(crate) fn bytes_of(pages: PageCount) -> u64 {
    pages.bytes().0
}
