//! `plimsoll top`: a running daemon as it is now: the host, its machines, where their memory is, and why.
//!
//! Enters: a daemon, keys. Leaves: a picture that is drawn anew with every decision of the daemon, or with `--once` and
//! `--json` one of them as text. What must never happen: a terminal left as we need it, and not as it was found; so it is given back
//! by whatever drops the [`screen::Screen`], and by the panic hook before a panic is said.
//!
//! * `feed`: asks, on a thread of its own, so that no key waits for a daemon. `state`: what is known, sorted and chosen.
//! * `draw`: the picture, from the state alone. `screen`: the terminal.
mod draw;
mod feed;
mod screen;
mod state;

use crate::live::LiveArgs;
use crate::signals::signals;
use crate::verb::ended;
use draw::Palette;
use feed::{Snapshot, ask};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use screen::Screen;
use serde::Serialize;
use state::{Row, Sort, State};
use std::fmt;
use std::io::{IsTerminal, Read, stdin, stdout};
use std::process::ExitCode;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// How long is waited for a second decision, from which faults a second follow. The loop decides once a second.
const SECOND_LOOK: Duration = Duration::from_secs(3);
/// Between two looks whether there is one.
const PAUSE: Duration = Duration::from_millis(100);
/// Columns of what is not written to a terminal.
const PLAIN_WIDTH: u16 = 80;

#[derive(clap::Args)]
pub(crate) struct TopArgs {
    /// Say it once, and end. So it is also where standard output is no terminal.
    #[arg(long)]
    once: bool,
    /// What machines are ordered by at first.
    #[arg(long, value_enum, default_value_t = Sort::Used)]
    sort: Sort,
    /// No colours. So it is also where NO_COLOR is set.
    #[arg(long)]
    no_color: bool,
    #[command(flatten)]
    live: LiveArgs,
}

pub(crate) fn main(args: &TopArgs) -> ExitCode {
    let is_once = args.once || args.live.is_json() || !stdout().is_terminal() || !stdin().is_terminal();
    let run = if is_once { once(args) } else { live(args) };
    ended("top", run.map(|()| ExitCode::SUCCESS))
}

/// The host and its machines, once.
#[derive(Serialize)]
struct Once {
    host: plimsoll_host::api::Host,
    machines: Vec<Row>,
    #[serde(skip)]
    text: String,
}

impl fmt::Display for Once {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn once(args: &TopArgs) -> Result<(), String> {
    let client = args.live.client().map_err(|error| plimsoll_linux::explain(&error))?;
    let look = || ask(&client, None).map_err(|error| plimsoll_linux::explain(&error));
    let mut state = State::new(args.sort);
    let (deadline, first) = (Instant::now() + SECOND_LOOK, look()?);
    let decided = first.host.decided_unix_ms;
    state.heard(Ok(first));
    while state.host().is_some_and(|host| host.decided_unix_ms == decided) && Instant::now() < deadline {
        thread::sleep(PAUSE);
        state.heard(Ok(look()?));
    }
    let Some(host) = state.host().cloned() else { return Ok(()) };
    let text = draw::plain(&state, PLAIN_WIDTH);
    args.live.show(&Once { host, machines: state.into_rows(), text })
}

/// What the picture changes for.
enum Message {
    Heard(Result<Box<Snapshot>, String>),
    Key(KeyEvent),
    /// The terminal has another size.
    Resized,
    /// A signal, or a terminal that is gone.
    End,
}

fn live(args: &TopArgs) -> Result<(), String> {
    let (tell, told) = channel();
    let (choose, chosen) = channel();
    // From here on a signal is a message, and the terminal is given back.
    let mut end = signals()?;
    let mut screen = Screen::open()?;
    let is_plain = args.no_color || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let palette = if is_plain { Palette::PLAIN } else { Palette::COLOURS };
    let client = args.live.client().map_err(|error| plimsoll_linux::explain(&error))?;
    let (to_feed, to_end) = (tell.clone(), tell.clone());
    thread::spawn(move || {
        feed::run(&client, &chosen, |heard| to_feed.send(Message::Heard(heard.map(Box::new))).is_ok());
    });
    thread::spawn(move || {
        let _ = end.read(&mut [0]);
        let _ = to_end.send(Message::End);
    });
    thread::spawn(move || read_keys(&tell));
    let mut state = State::new(args.sort);
    loop {
        screen.draw(|frame| draw::picture(frame, &state, palette))?;
        // Whoever could tell more has ended: so do we.
        let Ok(message) = told.recv() else { return Ok(()) };
        match message {
            Message::Heard(heard) => state.heard(heard.map(|snapshot| *snapshot)),
            Message::Key(key) if is_end(key) => return Ok(()),
            Message::Key(key) => pressed(&mut state, key.code),
            Message::Resized => {}
            Message::End => return Ok(()),
        }
        if let Some(choice) = state.new_choice() {
            // Without a feed there is nothing to choose from.
            let _ = choose.send(choice);
        }
    }
}

fn read_keys(tell: &Sender<Message>) {
    loop {
        let message = match event::read() {
            Ok(Event::Key(key)) if key.kind != KeyEventKind::Release => Message::Key(key),
            Ok(Event::Resize(..)) => Message::Resized,
            Ok(_) => continue,
            Err(_) => Message::End,
        };
        let is_over = matches!(message, Message::End);
        if tell.send(message).is_err() || is_over {
            return;
        }
    }
}

fn is_end(key: KeyEvent) -> bool {
    let is_interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    is_interrupt || matches!(key.code, KeyCode::Char('q'))
}

fn pressed(state: &mut State, key: KeyCode) {
    match key {
        KeyCode::Down | KeyCode::Char('j') => state.choose(|at| at.saturating_add(1)),
        KeyCode::Up | KeyCode::Char('k') => state.choose(|at| at.saturating_sub(1)),
        KeyCode::PageDown => state.choose(|at| at.saturating_add(10)),
        KeyCode::PageUp => state.choose(|at| at.saturating_sub(10)),
        KeyCode::Home | KeyCode::Char('g') => state.choose(|_| 0),
        KeyCode::End | KeyCode::Char('G') => state.choose(|_| usize::MAX),
        KeyCode::Enter | KeyCode::Char(' ') => state.is_open = !state.is_open,
        KeyCode::Char('r') => state.reverse(),
        KeyCode::Char(letter) => {
            if let Some(sort) = Sort::ALL.into_iter().find(|sort| sort.key() == letter) {
                state.sort_by(sort);
            }
        }
        _ => {}
    }
}
