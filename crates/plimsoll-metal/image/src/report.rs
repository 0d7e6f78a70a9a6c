//! What a run came to, as lines that a program reads.
//!
//! Enters: the host, at the end of the work and at the end of all. Leaves: the demo's report in [`Line`]s. Sizes are those at the end
//! of the work, before the last check brings every page back; what the check found is added.
use crate::console::say;
use crate::cpu;
use crate::guest::{Guest, State};
use crate::host::Host;
use crate::memory::heap_used;
use crate::wire::{GuestLine, HostLine, Line};
use alloc::string::ToString;
use alloc::vec::Vec;
use plimsoll_core::word::StateKind;
use plimsoll_guest::abi::latency_floor;
use plimsoll_types::{PAGE_SIZE, PageCount};

/// What was seen at the end of the work.
#[derive(Default)]
pub struct Seen {
    guests: Vec<GuestLine>,
    host: HostLine,
}

/// Ticks as nanoseconds.
fn ns(ticks: u64, tsc_hz: u64) -> u64 {
    u64::try_from(u128::from(ticks) * 1_000_000_000 / u128::from(tsc_hz.max(1))).unwrap_or(u64::MAX)
}

/// The ticks below which `percent` of what the buckets count lie.
fn quantile(buckets: impl Iterator<Item = u64> + Clone, percent: u64) -> u64 {
    let wanted = (buckets.clone().sum::<u64>() * percent).div_ceil(100);
    let mut seen = 0;
    for (bucket, count) in buckets.enumerate() {
        seen += count;
        if seen >= wanted && seen > 0 {
            return latency_floor(bucket);
        }
    }
    0
}

fn guest_line(guest: &Guest, tsc_hz: u64) -> GuestLine {
    let report = &guest.report;
    let faults = guest.times.faults;
    let operations = report.latency.iter().map(|count| u64::from(*count));
    let running =
        if report.running_ticks == 0 { 0 } else { report.now_ticks.saturating_sub(report.running_ticks) };
    let bytes = |pages: PageCount| pages.bytes().0;
    GuestLine {
        name: guest.name.clone(),
        size_bytes: bytes(guest.paged.size()),
        resident_bytes: bytes(guest.paged.resident()),
        limbo_bytes: bytes(guest.paged.limbo()),
        stored_bytes: bytes(guest.paged.pages(StateKind::Stored)),
        true_working_set_bytes: guest.windows.last().map(|(_, pages)| pages.saturating_mul(PAGE_SIZE as u64)),
        estimated_working_set_bytes: guest.paged.working_set().map(bytes),
        operations: report.operations,
        running_ns: ns(running, tsc_hz),
        operation_p50_ns: ns(quantile(operations.clone(), 50), tsc_hz),
        operation_p99_ns: ns(quantile(operations, 99), tsc_hz),
        faults: faults.iter().sum(),
        fault_p50_ns: ns(quantile(faults.into_iter(), 50), tsc_hz),
        fault_p99_ns: ns(quantile(faults.into_iter(), 99), tsc_hz),
        stalled_ns: ns(guest.times.stalled, tsc_hz),
        elapsed_ns: ns(cpu::now().saturating_sub(guest.times.started), tsc_hz),
        exits: guest.exits,
        ticks: guest.ticks,
        ..GuestLine::default()
    }
}

impl Seen {
    /// Looks.
    pub fn look(host: &mut Host, tsc_hz: u64) -> Self {
        for place in 0..host.guests.len() {
            if matches!(host.guests[place].state, State::Ended(_)) {
                continue;
            }
            // One whose channel cannot be reached dies of that in its next turn.
            let _ = host.guests[place].look(&mut host.pool);
        }
        let guests: Vec<_> = host.guests.iter().map(|guest| guest_line(guest, tsc_hz)).collect();
        let sum = |field: fn(&GuestLine) -> u64| guests.iter().map(field).sum::<u64>();
        let stats = host.pool.store.stats();
        let page = PAGE_SIZE as u64;
        let unique = (stats.same.0 + stats.lz4.0 + stats.raw.0) * page;
        let dropped_zero = host
            .guests
            .iter()
            .map(|guest| guest.paged.pages(StateKind::Zero).0.min(guest.paged.done.dropped_zero));
        let bookkeeping: u64 = host.guests.iter().map(|guest| guest.paged.table_bytes()).sum();
        let used = host.pool.memory.borrow().used().bytes().0;
        let (resident, limbo) = (sum(|guest| guest.resident_bytes), sum(|guest| guest.limbo_bytes));
        let slabs = (stats.data_slabs + stats.record_slabs).0;
        let line = HostLine {
            asked_bytes: sum(|guest| guest.size_bytes),
            resident_bytes: resident,
            limbo_bytes: limbo,
            store_bytes: slabs,
            tables_bytes: bookkeeping,
            overhead_bytes: used.saturating_sub(resident + limbo + slabs + bookkeeping),
            saved_zero_bytes: dropped_zero.sum::<u64>() * page,
            saved_duplicate_bytes: stats.duplicate.0 * page,
            saved_compression_bytes: unique.saturating_sub(stats.data.0),
            stored_pages: stats.pages.0,
            store_metadata_bytes: stats.metadata.0,
            store_fragmentation_permille: stats.fragmentation().per_mille(),
            near_duplicate_pages: stats.near_duplicate.0,
            ..HostLine::default()
        };
        Self { guests, host: line }
    }

    /// Says everything, after the last check.
    pub fn say(mut self, host: &Host) {
        for (line, guest) in self.guests.iter_mut().zip(&host.guests) {
            line.captured_pages = guest.paged.done.captured;
            line.anomalies = guest.paged.done.anomalies;
            line.verified_code_pages = guest.paged.guard.verified;
            line.refused_accesses = guest.paged.guard.refused;
            line.refused_device_accesses = guest.device_refusals;
            line.verified_pages = guest.report.verified_pages;
            line.wrong_words = guest.report.wrong_words;
            line.died = match &guest.state {
                State::Ended(Ok(())) => None,
                State::Ended(Err(death)) => Some(death.to_string()),
                _ => Some("it did not end".to_string()),
            };
        }
        let memory = host.pool.memory.borrow();
        self.host.budget_bytes = memory.total().bytes().0;
        self.host.peak_bytes = memory.peak().bytes().0;
        self.host.exits = host.guests.iter().map(|guest| guest.exits).sum();
        self.host.nested_faults = host.nested_faults;
        self.host.harvested_pages = host.guests.iter().map(|guest| guest.paged.done.harvested).sum();
        say!("heap: {} in use; tables wait: {}", heap_used(), memory.pooled().bytes());
        let failures = host.failures.iter().map(|why| Line::Failure { why: why.clone() });
        let guests = self.guests.into_iter().map(Line::Guest);
        for line in guests.chain([Line::Host(self.host)]).chain(failures) {
            match serde_json::to_string(&line) {
                Ok(text) => say!("{text}"),
                Err(error) => say!("a line of the report cannot be written: {error}"),
            }
        }
    }
}
