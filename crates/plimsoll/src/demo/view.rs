//! What the demo shows while it runs: a live line per guest on a terminal, a line every few seconds otherwise.
use super::fleet::GuestState;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use plimsoll_types::ByteCount;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Without a terminal, how often a line is printed.
const PLAIN_PERIOD: Duration = Duration::from_secs(5);

/// One guest at one moment.
pub(crate) struct GuestLine {
    pub(crate) name: String,
    pub(crate) size: ByteCount,
    /// Not known of a guest that nobody manages.
    pub(crate) memory: Option<GuestMemory>,
    pub(crate) state: GuestState,
}

pub(crate) struct GuestMemory {
    pub(crate) resident: ByteCount,
    pub(crate) limbo: ByteCount,
    pub(crate) stored: ByteCount,
}

/// The host at one moment.
pub(crate) struct HostLine {
    pub(crate) phase: String,
    pub(crate) used: ByteCount,
    pub(crate) budget: ByteCount,
}

enum Surface {
    Live { bars: MultiProgress, lines: Vec<ProgressBar> },
    Plain { printed: Option<Instant>, started: Instant },
}

pub(crate) struct View(Surface);

impl View {
    /// For that many guests, and the host.
    pub(crate) fn new(guests: usize) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(Surface::Plain { printed: None, started: Instant::now() });
        }
        let bars = MultiProgress::new();
        let style =
            ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
        let line = |_| bars.add(ProgressBar::new_spinner().with_style(style.clone()));
        let lines = (0..=guests).map(line).collect();
        Self(Surface::Live { bars, lines })
    }

    pub(crate) fn show(&mut self, host: &HostLine, guests: &[GuestLine]) {
        match &mut self.0 {
            Surface::Live { lines, .. } => {
                let mut lines = lines.iter();
                if let Some(line) = lines.next() {
                    line.set_message(format!(
                        "{:<10} {:>6} of {:<6} {}",
                        host.phase,
                        host.used,
                        host.budget,
                        bar(&[(host.used, '#')], host.budget)
                    ));
                    line.tick();
                }
                for (line, guest) in lines.zip(guests) {
                    line.set_message(guest_line(guest));
                    line.tick();
                }
            }
            Surface::Plain { printed, started } => {
                if printed.is_some_and(|printed| printed.elapsed() < PLAIN_PERIOD) {
                    return;
                }
                *printed = Some(Instant::now());
                let operations: u64 = guests.iter().map(|guest| guest.state.summary.operations).sum();
                let wrong: u64 = guests.iter().map(|guest| guest.state.summary.wrong_words).sum();
                let populated: u64 = guests.iter().map(|guest| guest.state.summary.populated_pages).sum();
                let footprint: u64 = guests.iter().map(|guest| guest.state.summary.footprint_pages).sum();
                eprintln!(
                    "{:>4} s {}: used {} of {}, populated {} %, {operations} operations, {wrong} wrong words",
                    started.elapsed().as_secs(),
                    host.phase,
                    host.used,
                    host.budget,
                    populated * 100 / footprint.max(1)
                );
            }
        }
    }

    pub(crate) fn finish(self) {
        if let Surface::Live { bars, lines } = self.0 {
            lines.iter().for_each(ProgressBar::finish_and_clear);
            let _ = bars.clear();
        }
    }
}

fn guest_line(guest: &GuestLine) -> String {
    let summary = &guest.state.summary;
    let memory = guest.memory.as_ref().map_or(String::new(), |memory| {
        bar(&[(memory.resident, '#'), (memory.limbo, '+'), (memory.stored, ':')], guest.size)
    });
    let died = guest.state.died.as_deref().unwrap_or("");
    format!(
        "{:<9} {memory} {:>10} {:>9} ops {:>3} wrong {died}",
        guest.name, summary.phase, summary.operations, summary.wrong_words
    )
}

/// `#` resident, `+` limbo, `:` stored, blank where the guest has nothing.
fn bar(parts: &[(ByteCount, char)], whole: ByteCount) -> String {
    const WIDTH: u16 = 32;
    let mut text = String::from("[");
    for (part, mark) in parts {
        let width = (part.0 * u64::from(WIDTH)).div_ceil(whole.0.max(1));
        (0..width).for_each(|_| text.push(*mark));
    }
    let drawn: String = text.chars().take(usize::from(WIDTH) + 1).collect();
    format!("{drawn:<33}]")
}
