//! The picture: from the state alone, for any size of terminal.
//!
//! Enters: a [`State`], a width or a frame. Leaves: lines. 80 columns show everything but the last reason of every machine, which wider
//! terminals have room for. What is told by colour is told by shape, too.
use super::state::{Link, Row, State};
use crate::why::wrapped;
use plimsoll_host::api::{Cell, Machine, MachineKind, MachineState, Map, Pages, Why};
use plimsoll_policy::Ppm;
use plimsoll_types::ByteCount;
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

/// Colours, or none.
#[derive(Clone, Copy)]
pub(super) struct Palette {
    has_colours: bool,
}

impl Palette {
    pub(super) const PLAIN: Self = Self { has_colours: false };
    pub(super) const COLOURS: Self = Self { has_colours: true };

    fn of(self, colour: Color) -> Style {
        if self.has_colours { Style::new().fg(colour) } else { Style::new() }
    }
}

const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);
const DIM: Style = Style::new().add_modifier(Modifier::DIM);

/// Where memory is: its mark, its colour, its name, and how much of a machine is there.
type Place = (&'static str, Color, &'static str, fn(&Pages) -> u64);
const PLACES: [Place; 5] = [
    ("█", Color::Green, "resident", |pages| pages.resident_bytes),
    ("▓", Color::Yellow, "limbo", |pages| pages.limbo_bytes),
    ("▒", Color::Blue, "stored", |pages| pages.stored_bytes),
    ("░", Color::Magenta, "on disk", |pages| pages.disk_bytes),
    ("·", Color::DarkGray, "free", |pages| pages.free_bytes),
];
/// The part of a cell, in millionths, that came back lately and makes it hot: one page in 32.
const HOT: u32 = 31_250;
const HOT_COLOUR: Color = Color::Red;

const NAME: usize = 16;
const BAR: usize = 22;
/// What a row takes without its reason.
const ROW: usize = 79;
/// Reasons shorter than that are not worth their column.
const REASON_MIN: usize = 20;
/// Cells in a line of the map.
const MAP: usize = 32;
/// Where the map begins.
const MAP_AT: usize = 36;
/// Lines that more about a machine takes at least.
const DETAIL_MIN: u16 = 12;

/// What a name, or a sentence, is on a terminal: what would steer that is not in it.
fn harmless(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { '?' } else { letter }).collect()
}

/// Parts of a whole as cells that add up to `width`, whatever is rounded.
fn bar(parts: impl Iterator<Item = (u64, Span<'static>)>, whole: u64, width: usize) -> Vec<Span<'static>> {
    let at = |sum: u64| {
        let cells = u128::from(sum.min(whole)) * width as u128 + u128::from(whole) / 2;
        usize::try_from(cells.checked_div(u128::from(whole)).unwrap_or(0)).unwrap_or(width).min(width)
    };
    let (mut sum, mut spans) = (0_u64, Vec::new());
    for (part, mark) in parts {
        let from = at(sum);
        sum = sum.saturating_add(part);
        spans.push(Span::styled(mark.content.repeat(at(sum) - from), mark.style));
    }
    spans.push(Span::raw(" ".repeat(width - at(sum))));
    spans
}

fn machine_bar(pages: Option<&Pages>, size: u64, palette: Palette) -> Vec<Span<'static>> {
    let Some(pages) = pages else { return vec![Span::raw(" ".repeat(BAR))] };
    bar(
        PLACES.map(|(mark, colour, _, of)| (of(pages), Span::styled(mark, palette.of(colour)))).into_iter(),
        size,
        BAR,
    )
}

/// The host in three lines: sizes, a bar with the mark that is to stay free, and what there is to be said.
fn host_lines(state: &State, width: usize, palette: Palette) -> Vec<Line<'static>> {
    let Some(host) = state.host() else {
        let why = match &state.link {
            Link::Away(why) => why.clone(),
            _ => "the daemon is asked".to_owned(),
        };
        return wrapped(&harmless(&why), width.max(1)).into_iter().map(Line::raw).collect();
    };
    let used = host.budget_bytes.saturating_sub(host.free_bytes);
    let is_well = matches!(&*host.state, "high" | "clear");
    let state_style =
        palette.of(if is_well { Color::Green } else { Color::Red }).add_modifier(Modifier::BOLD);
    let size = ByteCount;
    let first = Line::from(vec![
        Span::styled(format!("plimsoll {}", host.version), BOLD),
        Span::raw(format!(
            "  budget {}  used {}  free {}  reserved {}  machines {}  ",
            size(host.budget_bytes),
            size(used),
            size(host.free_bytes),
            size(host.reserved_bytes),
            host.machines
        )),
        Span::styled(host.state.clone(), state_style),
    ]);
    let keeps = host.kept_free_bytes.min(host.free_bytes);
    let parts = [
        (used, Span::styled("█", palette.of(if is_well { Color::Green } else { Color::Red }))),
        (host.free_bytes - keeps, Span::styled("·", palette.of(Color::DarkGray))),
        // The line: what is to stay free.
        (keeps, Span::styled("|", palette.of(Color::Cyan))),
    ];
    let second = Line::from(bar(parts.into_iter(), host.budget_bytes, width));
    let third = match &state.link {
        Link::Away(why) => Line::styled(
            harmless(&format!("no answer, what is shown is old: {why}")),
            palette.of(Color::Red).add_modifier(Modifier::REVERSED),
        ),
        Link::Back(_) => {
            Line::styled("the daemon answers again", palette.of(Color::Green).add_modifier(Modifier::BOLD))
        }
        _ if !host.waiting.is_empty() => {
            let names: Vec<&str> = host.waiting.iter().map(|one| &*one.name).collect();
            Line::raw(harmless(&format!("awaited: {}", names.join(", "))))
        }
        _ => legend(palette),
    };
    vec![first, second, third]
}

fn legend(palette: Palette) -> Line<'static> {
    let mut spans: Vec<Span<'static>> = PLACES
        .iter()
        .flat_map(|(mark, colour, name, _)| {
            [Span::styled(*mark, palette.of(*colour)), Span::styled(format!(" {name}  "), DIM)]
        })
        .collect();
    spans.push(Span::styled("|", palette.of(Color::Cyan)));
    spans.push(Span::styled(" kept free", DIM));
    Line::from(spans)
}

fn head(width: usize) -> Line<'static> {
    let reason = if width >= ROW + 1 + REASON_MIN { "last reason" } else { "" };
    Line::styled(
        format!(
            "{:<NAME$} {:<BAR$} {:>6} {:>7} {:>7} {:>7} {:>8} {reason}",
            "machine", "memory", "size", "used", "target", "faults/s", "waits"
        ),
        BOLD,
    )
}

fn row_line(row: &Row, width: usize, palette: Palette) -> Line<'static> {
    let machine = &row.machine;
    let name: String = harmless(&machine.name).chars().take(NAME).collect();
    let mut spans = vec![Span::raw(format!("{name:<NAME$} "))];
    spans.extend(machine_bar(machine.pages.as_ref(), machine.size_bytes, palette));
    let size = ByteCount(machine.size_bytes).to_string();
    let faults = row.faults_per_second.map_or("-".to_owned(), |faults| faults.to_string());
    let numbers = match &machine.memory {
        Some(memory) => {
            let (used, target) = (ByteCount(memory.consumed_bytes), ByteCount(memory.target_bytes));
            let waits = Ppm(memory.stalled_ppm).to_string();
            format!(" {size:>6} {used:>7} {target:>7} {faults:>8} {waits:>8}")
        }
        None => format!(" {size:>6} {:>7} {:>7} {faults:>8} {:>8}", "-", "-", "-"),
    };
    spans.push(Span::raw(numbers));
    let is_plain = machine.state == MachineState::Running && machine.trouble.is_none();
    if width > ROW + REASON_MIN {
        let said = machine.trouble.as_ref().or(machine.reason.as_ref()).map_or("", |said| said);
        spans.push(Span::styled(format!(" {}", harmless(said)), if is_plain { DIM } else { BOLD }));
    }
    Line::from(spans)
}

/// Host and machines, in colours or not.
fn table(state: &State, width: usize, palette: Palette) -> (Vec<Line<'static>>, Vec<Line<'static>>) {
    let mut top = host_lines(state, width, palette);
    if state.host().is_some() {
        top.push(head(width));
    }
    (top, state.rows().iter().map(|row| row_line(row, width, palette)).collect())
}

/// The same as text.
pub(super) fn plain(state: &State, width: u16) -> String {
    let (top, rows) = table(state, usize::from(width), Palette::PLAIN);
    let text = |line: Line<'static>| line.to_string().trim_end().to_owned() + "\n";
    let empty = if rows.is_empty() { "no machine is managed\n" } else { "" };
    top.into_iter().chain(rows).map(text).collect::<String>() + empty
}

/// More about a machine: its memory by state beside its map, and what was decided.
fn detail_lines(state: &State, width: usize, palette: Palette) -> Vec<Line<'static>> {
    let Some((row, detail)) = state.detail() else { return Vec::new() };
    let machine = &row.machine;
    let kind = match machine.kind {
        MachineKind::Attached => "managed from outside",
        MachineKind::HandedOver => "handed over by its VMM",
    };
    let pid = machine.pid.map(|pid| format!(", process {pid}")).unwrap_or_default();
    let title = harmless(&format!("{}: {}, {kind}{pid}", machine.name, machine.state.text()));
    let mut lines = vec![Line::styled(title, BOLD)];
    lines.extend(machine.trouble.as_ref().map(|said| Line::raw(harmless(&format!("  {said}")))));
    let map =
        detail.and_then(|detail| detail.map.as_ref()).map(|map| map_lines(map, palette)).unwrap_or_default();
    let mut left = memory_lines(machine, palette);
    left.resize(left.len().max(map.len()), Line::default());
    for (place, mut line) in left.into_iter().enumerate() {
        if let Some(cells) = map.get(place) {
            let used = line.width();
            line.push_span(Span::raw(" ".repeat(MAP_AT.saturating_sub(used))));
            line.spans.extend(cells.iter().cloned());
        }
        lines.push(line);
    }
    if let Some(why) = detail.and_then(|detail| detail.why.as_ref()) {
        lines.push(Line::default());
        lines.extend(reasons(why, width));
    }
    lines
}

fn memory_lines(machine: &Machine, palette: Palette) -> Vec<Line<'static>> {
    let mut lines: Vec<Line<'static>> = Vec::new();
    if let Some(pages) = &machine.pages {
        for (mark, colour, name, of) in PLACES {
            let part = Ppm::of(of(pages), machine.size_bytes);
            let percent = u64::from(part.0) / 10_000;
            lines.push(Line::from(vec![
                Span::styled(format!("  {mark} "), palette.of(colour)),
                Span::raw(format!("{name:<10} {:>8} {percent:>4} %", ByteCount(of(pages)))),
            ]));
        }
        let given = pages.given().into_iter().filter(|(_, bytes)| *bytes > 0);
        lines.extend(given.map(|(how, bytes)| Line::raw(format!("      {how:<10} {:>6}", ByteCount(bytes)))));
    }
    if let Some(memory) = &machine.memory {
        let sizes = [
            ("uses", memory.active_bytes),
            ("entitled", memory.entitlement_bytes),
            ("compressed", memory.stored_bytes),
        ];
        let line = |(name, bytes)| Line::raw(format!("    {name:<10} {:>8}", ByteCount(bytes)));
        lines.extend(sizes.map(line));
    }
    lines
}

/// A cell's mark is of the state that most of it is in.
fn map_lines(map: &Map, palette: Palette) -> Vec<Vec<Span<'static>>> {
    let span = |cell: &Cell| {
        let Cell { resident_ppm, limbo_ppm, stored_ppm, heat_ppm } = *cell;
        let free =
            1_000_000_u32.saturating_sub(resident_ppm).saturating_sub(limbo_ppm).saturating_sub(stored_ppm);
        let parts = [(resident_ppm, 0), (limbo_ppm, 1), (stored_ppm, 2), (free, 4)];
        // Of equal parts the warmer one.
        let place = parts.into_iter().rev().max_by_key(|(part, _)| *part).map_or(4, |(_, place)| place);
        let (mark, colour, ..) = PLACES[place];
        let is_hot = heat_ppm.is_some_and(|heat| heat >= HOT);
        let style = palette.of(if is_hot { HOT_COLOUR } else { colour });
        Span::styled(mark, if is_hot { style.add_modifier(Modifier::BOLD) } else { style })
    };
    map.cells.chunks(MAP).map(|cells| cells.iter().map(span).collect()).collect()
}

/// The newest first.
fn reasons(why: &Why, width: usize) -> Vec<Line<'static>> {
    const INDENT: usize = 10;
    let mut lines = Vec::new();
    for entry in why.entries.iter().rev() {
        let seconds = why.at_ms.saturating_sub(entry.at_ms) / 1000;
        let often = if entry.times > 1 { format!(" ({} times)", entry.times) } else { String::new() };
        let refused = entry.refused.as_ref().map_or_else(String::new, |why| format!("; not done: {why}"));
        let text = harmless(&format!("{}{refused}{often}", entry.sentence));
        let when = if seconds == 0 { "now".to_owned() } else { format!("{seconds} s ago") };
        for (place, part) in wrapped(&text, width.saturating_sub(INDENT).max(20)).into_iter().enumerate() {
            let margin = if place == 0 { when.clone() } else { String::new() };
            lines.push(Line::from(vec![Span::styled(format!("{margin:>9} "), DIM), Span::raw(part)]));
        }
    }
    lines
}

/// The whole picture.
pub(super) fn picture(frame: &mut Frame<'_>, state: &State, palette: Palette) {
    let area = frame.area();
    let width = usize::from(area.width);
    let (top, mut rows) = table(state, width, palette);
    let fixed = u16::try_from(top.len()).unwrap_or(u16::MAX).saturating_add(1);
    // The last line is for the keys, where there is room for them.
    let bottom = if area.height > fixed { area.bottom() - 1 } else { area.bottom() };
    let mut at = area.y;
    let mut put = |lines: Vec<Line<'static>>, most: u16| {
        let height = u16::try_from(lines.len()).unwrap_or(u16::MAX).min(most).min(bottom.saturating_sub(at));
        frame.render_widget(Paragraph::new(lines), Rect { y: at, height, ..area });
        at += height;
    };
    put(top, u16::MAX);
    let room = area.height.saturating_sub(fixed);
    let detail = if state.is_open { detail_lines(state, width, palette) } else { Vec::new() };
    let many = u16::try_from(rows.len()).unwrap_or(u16::MAX);
    // Three machines at least, and then as much as is asked for.
    let for_rows =
        if detail.is_empty() || room < DETAIL_MIN + 3 { room } else { many.min((room - DETAIL_MIN).max(3)) };
    if let Some(chosen) = state.at() {
        let highlight = Style::new().add_modifier(Modifier::REVERSED);
        if let Some(line) = rows.get_mut(chosen) {
            let name = line.spans[0].clone();
            line.spans[0] = name.patch_style(highlight);
        }
        // The chosen one is always in sight.
        let first = chosen.saturating_sub(usize::from(for_rows).saturating_sub(1));
        rows.drain(..first);
    }
    if state.host().is_some() && rows.is_empty() {
        rows.push(Line::styled("no machine is managed", DIM));
    }
    put(rows, for_rows.max(1));
    put(std::iter::once(Line::default()).chain(detail).collect(), u16::MAX);
    let keys = "q end  ↑↓ choose  enter more  sort: n s u t f w  r reverse";
    let line = Line::styled(format!("{keys}   by {:?}", state.sort).to_lowercase(), DIM);
    if bottom < area.bottom() {
        frame.render_widget(Paragraph::new(line), Rect { y: bottom, height: 1, ..area });
    }
}

#[cfg(test)]
mod tests {
    use super::super::feed::{Detail, Snapshot};
    use super::super::state::Sort;
    use super::super::state::tests::snapshot;
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn drawn(state: &State, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| picture(frame, state, Palette::COLOURS)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        (0..height).map(line).collect()
    }

    fn full(machines: usize) -> State {
        let names: Vec<String> = (0..machines).map(|place| format!("m{place:02}")).collect();
        let machines: Vec<_> = names.iter().map(|name| (&**name, 700, 10)).collect();
        let cell = Cell { resident_ppm: 900_000, limbo_ppm: 0, stored_ppm: 0, heat_ppm: Some(0) };
        let free = Cell { resident_ppm: 0, ..cell };
        let map = Map { name: "m00".to_owned(), cells: [vec![cell; 128], vec![free; 128]].concat() };
        let why = serde_json::json!({"name": "m00", "at_ms": 9000, "consumed_bytes": 0, "active_bytes": 0,
            "entitlement_bytes": 0, "target_bytes": 0, "entries": []});
        let why = Some(serde_json::from_value(why).unwrap());
        let detail = Some(Detail { name: "m00".to_owned(), why, map: Some(map) });
        let mut state = State::new(Sort::Used);
        state.heard(Ok(Snapshot { detail, ..snapshot(1, 1000, &machines) }));
        state
    }

    #[test]
    fn eighty_columns_show_the_host_machines_their_memory_and_the_map() {
        let lines = drawn(&full(2), 80, 24);
        let all = lines.join("\n");
        assert!(lines[0].contains("budget 4G  used 3G  free 1G") && lines[0].ends_with("high"), "{all}");
        assert!(lines[1].starts_with("█████") && lines[1].ends_with("|||||"), "{all}");
        let row = lines.iter().find(|line| line.starts_with("m00 ")).unwrap();
        assert!(row.contains("███████████▓▓▓▒▒▒▒░·") && row.ends_with("0.4 %"), "{row}");
        assert!(row.chars().count() <= 80 && !row.contains("its target"), "{row}");
        assert!(all.contains("█ resident       512M   50 %"), "{all}");
        assert!(all.contains(&"█".repeat(MAP)) && all.contains(&"·".repeat(MAP)), "{all}");
        assert!(lines[23].contains("q end") && lines[23].ends_with("by used"), "{all}");
    }

    #[test]
    fn a_wide_terminal_has_reasons_and_a_tiny_one_does_no_harm() {
        let wide = drawn(&full(2), 140, 24).join("\n");
        assert!(wide.contains("last reason") && wide.contains("its target goes from 700M to 600M"), "{wide}");
        let state = full(40);
        for (width, height) in [(1, 1), (20, 3), (80, 5), (40, 10), (300, 90)] {
            drawn(&state, width, height);
        }
    }

    #[test]
    fn the_chosen_machine_is_in_sight_however_many_there_are() {
        let mut state = full(40);
        state.choose(|_| usize::MAX);
        for height in [10, 24, 50] {
            assert!(drawn(&state, 80, height).iter().any(|line| line.starts_with("m39 ")), "{height} lines");
        }
    }

    #[test]
    fn names_do_not_steer_the_terminal_and_parts_always_add_up_to_the_bar() {
        let mut state = State::new(Sort::Used);
        state.heard(Ok(snapshot(1, 0, &[("a\u{1b}[2Jb", 1, 0)])));
        assert!(plain(&state, 80).contains("a?[2Jb"));
        let widths = |parts: &[u64], whole| {
            let parts = parts.iter().map(|part| (*part, Span::raw("x")));
            bar(parts, whole, 10).iter().map(Span::width).sum::<usize>()
        };
        for parts in [&[1, 1, 1][..], &[0; 3], &[5, 7, 90], &[u64::MAX, u64::MAX]] {
            assert_eq!((widths(parts, 100), widths(parts, 0)), (10, 10));
        }
    }
}
