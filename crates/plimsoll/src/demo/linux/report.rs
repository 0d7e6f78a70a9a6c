//! What the run of stock guests found: text for people, JSON for programs (docs/demo-report.md).
use super::herd::{Host, Known};
use crate::demo::DemoArgs;
use plimsoll_types::ByteCount;
use serde::Serialize;
use std::fmt::Write;

/// The budget is aimed at from outside, not enforced: what a guest grows by between two looks may be over it.
const TOLERANCE_PERCENT: u64 = 5;

#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    version: u32,
    guests_are: String,
    seed: u64,
    mix: String,
    seconds: u64,
    asked_bytes: u64,
    budget_bytes: u64,
    /// Guest RAM in place and the compressed rest, at the end of the work.
    taken_bytes: u64,
    resident_bytes: u64,
    swapped_bytes: u64,
    compressed_bytes: u64,
    /// Of everything, QEMUs included.
    peak_bytes: u64,
    peak_source: String,
    wrong_words: u64,
    guests: Vec<GuestReport>,
    pub(super) failures: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct GuestReport {
    name: String,
    size_bytes: u64,
    resident_bytes: u64,
    swapped_bytes: u64,
    true_working_set_bytes: u64,
    estimated_working_set_bytes: Option<u64>,
    operations: u64,
    operations_per_second: f64,
    disk_reads: u64,
    taken_pages: u64,
    refaulted_pages: u64,
    wrong_words: u64,
    failure: Option<String>,
}

impl GuestReport {
    pub(super) fn new(
        known: Known,
        size: ByteCount,
        during: &plimsoll_stock::Report,
        after: &plimsoll_stock::Report,
        sweep: Option<String>,
    ) -> Self {
        Self {
            name: known.name,
            size_bytes: size.0,
            resident_bytes: known.resident.0,
            swapped_bytes: known.elsewhere.0,
            true_working_set_bytes: during.touched.bytes().0,
            estimated_working_set_bytes: known.working_set.map(|bytes| bytes.0),
            operations: during.operations,
            operations_per_second: during.operations as f64 / during.uptime.as_secs_f64().max(1.0),
            disk_reads: during.disk_reads,
            taken_pages: known.taken.0,
            refaulted_pages: known.refaults.0,
            wrong_words: after.wrong,
            failure: known.trouble.or(sweep),
        }
    }
}

impl Report {
    pub(super) fn new(
        args: &DemoArgs,
        budget: ByteCount,
        host: Host,
        peak: ByteCount,
        peak_source: String,
        guests: Vec<GuestReport>,
    ) -> Self {
        let wrong_words = guests.iter().map(|guest| guest.wrong_words).sum();
        let mut failures: Vec<String> = Vec::new();
        if wrong_words > 0 {
            failures.push(format!("{wrong_words} wrong words"));
        }
        if host.total().0 > budget.0 / 100 * (100 + TOLERANCE_PERCENT) {
            failures.push(format!("the guests take {} of a budget of {budget}", host.total()));
        }
        let failed = |guest: &GuestReport| Some(format!("{}: {}", guest.name, guest.failure.as_ref()?));
        failures.extend(guests.iter().filter_map(failed));
        Self {
            version: 1,
            guests_are: "stock Linux under QEMU, managed from outside".to_owned(),
            seed: args.seed,
            mix: args.mix.clone(),
            seconds: args.seconds,
            asked_bytes: args.size.0 * u64::from(args.guests),
            budget_bytes: budget.0,
            taken_bytes: host.total().0,
            resident_bytes: host.resident.0,
            swapped_bytes: host.elsewhere.0,
            compressed_bytes: host.compressed.0,
            peak_bytes: peak.0,
            peak_source,
            wrong_words,
            guests,
            failures,
        }
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "{:<9} {:>6} {:>9} {:>9} {:>9} {:>9} {:>8} {:>7} {:>9} {:>9} {:>5}\n",
            "guest",
            "size",
            "in RAM",
            "in swap",
            "true ws",
            "est ws",
            "pages/s",
            "blocks",
            "taken",
            "back",
            "wrong"
        );
        let size = |bytes: u64| ByteCount(bytes).to_string();
        for guest in &self.guests {
            let estimate = guest.estimated_working_set_bytes.map_or_else(|| "-".to_owned(), size);
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "{:<9} {:>6} {:>9} {:>9} {:>9} {estimate:>9} {:>8.0} {:>7} {:>9} {:>9} {:>5}",
                guest.name,
                size(guest.size_bytes),
                size(guest.resident_bytes),
                size(guest.swapped_bytes),
                size(guest.true_working_set_bytes),
                guest.operations_per_second,
                guest.disk_reads,
                guest.taken_pages,
                guest.refaulted_pages,
                guest.wrong_words,
            );
        }
        let _ = writeln!(
            text,
            "\nhost: asked {}, budget {}, taken {} ({} in RAM, {} in swap as {})\n      everything with the QEMUs' own memory: peak {} ({})",
            size(self.asked_bytes),
            size(self.budget_bytes),
            size(self.taken_bytes),
            size(self.resident_bytes),
            size(self.swapped_bytes),
            size(self.compressed_bytes),
            size(self.peak_bytes),
            self.peak_source,
        );
        match self.failures.as_slice() {
            [] => text.push_str("\npassed: 0 wrong words in memory and on disk"),
            failures => failures.iter().for_each(|failure| {
                let _ = write!(text, "\nFAILED: {failure}");
            }),
        }
        text
    }
}
