//! What host and guest say to each other: lines of text over a serial port that nothing else writes to.
//!
//! This file is part of both programs, so that neither can know a word that the other does not.
//!
//! ```text
//! host:   NUMBER COMMAND ARGUMENT ...          a question; numbers are never used twice
//! guest:  plimsoll NUMBER ok KEY=COUNT ...     its answer, when it is done; short ones overtake long ones
//! guest:  plimsoll NUMBER error WHY            or why there is none
//! guest:  plimsoll ready KEY=COUNT ...         once, when it can be asked
//! guest:  plimsoll wrong WHAT KEY=COUNT ...    the first few wrong words, as soon as they are found
//! ```
//!
//! Each question is answered. Those that take long are done one after the other, in the order in which they were asked.
//! Whatever else arrives on the line is no part of the conversation and is passed over.
use plimsoll_guest::content::{Content, Mix, MixError};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// What every line of the guest begins with.
pub(crate) const MARK: &str = "plimsoll ";
/// Names of kernel parameters that are for the guest program begin so.
pub(crate) const PARAMETER: &str = "plimsoll.";
/// Seed of the pages that guests have in common.
const POOL_SEED: u64 = 1;
/// How many of them there are.
const POOL_PAGES: u64 = 256;

/// What the pages of a guest, or the blocks of a disk, with this seed must contain. Pages in version 1 are those written once.
///
/// # Errors
/// When the mix is none.
pub fn content(seed: u64, mix: Mix) -> Result<Content, MixError> {
    Content::new(seed, POOL_SEED, POOL_PAGES, mix)
}

/// What a guest can be told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Answer at once. The thread that answers is the one that touches memory.
    Ping,
    /// Take so many pages more, and write each of them.
    Alloc {
        /// Pages of 4 KiB.
        pages: u64,
    },
    /// Give all pages back to the guest's kernel.
    Free,
    /// Write each page anew.
    Fill,
    /// Verify each page once.
    Sweep,
    /// From now on verify so many pages a second, chosen at random among so many that are hot, and rewrite every fifth of them.
    /// Hot pages lie in groups of 16 neighbours, strewn over all of memory.
    Hot {
        /// Size of the hot set.
        pages: u64,
        /// Operations; 0 ends it.
        per_second: u64,
    },
    /// From now on read so many blocks a second from the disk, past the guest's cache, and write every eighth.
    Disk {
        /// Operations; 0 ends it.
        per_second: u64,
    },
    /// Neither hot set nor disk any more.
    Idle,
    /// Say what was done; starts a new window of the working set.
    Report,
    /// Switch the machine off.
    Off,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Ping => f.write_str("ping"),
            Self::Alloc { pages } => write!(f, "alloc {pages}"),
            Self::Free => f.write_str("free"),
            Self::Fill => f.write_str("fill"),
            Self::Sweep => f.write_str("sweep"),
            Self::Hot { pages, per_second } => write!(f, "hot {pages} {per_second}"),
            Self::Disk { per_second } => write!(f, "disk {per_second}"),
            Self::Idle => f.write_str("idle"),
            Self::Report => f.write_str("report"),
            Self::Off => f.write_str("off"),
        }
    }
}

/// A line that is no command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownCommand(String);

impl fmt::Display for UnknownCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is no command: use ping, alloc PAGES, free, fill, sweep, hot PAGES RATE, disk RATE, idle, report or off",
            self.0
        )
    }
}

impl std::error::Error for UnknownCommand {}

impl FromStr for Command {
    type Err = UnknownCommand;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || UnknownCommand(text.to_owned());
        let (name, arguments) = text.split_once(' ').unwrap_or((text, ""));
        let numbers: Result<Vec<u64>, _> = arguments.split_ascii_whitespace().map(str::parse).collect();
        Ok(match (name, numbers.map_err(|_| unknown())?.as_slice()) {
            ("ping", []) => Self::Ping,
            ("alloc", &[pages]) => Self::Alloc { pages },
            ("free", []) => Self::Free,
            ("fill", []) => Self::Fill,
            ("sweep", []) => Self::Sweep,
            ("hot", &[pages, per_second]) => Self::Hot { pages, per_second },
            ("disk", &[per_second]) => Self::Disk { per_second },
            ("idle", []) => Self::Idle,
            ("report", []) => Self::Report,
            ("off", []) => Self::Off,
            _ => return Err(unknown()),
        })
    }
}

/// Named counts, as answers carry them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(BTreeMap<String, u64>);

impl Counts {
    /// The count of that name.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.0.get(name).copied()
    }
}

impl<const N: usize> From<[(&str, u64); N]> for Counts {
    fn from(counts: [(&str, u64); N]) -> Self {
        Self(counts.into_iter().map(|(name, count)| (name.to_owned(), count)).collect())
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(name, count)| write!(f, " {name}={count}"))
    }
}

impl FromStr for Counts {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let pair = |word: &str| {
            let (name, count) = word.split_once('=')?;
            Some((name.to_owned(), count.parse().ok()?))
        };
        text.split_ascii_whitespace().map(pair).collect::<Option<_>>().map(Self).ok_or(())
    }
}

/// What a guest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// It can be asked.
    Ready(Counts),
    /// A word was not what it should be; the text says where.
    Wrong(String),
    /// A question is answered.
    Answer(u64, Result<Counts, String>),
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready(counts) => write!(f, "{MARK}ready{counts}"),
            Self::Wrong(place) => write!(f, "{MARK}wrong {place}"),
            Self::Answer(number, Ok(counts)) => write!(f, "{MARK}{number} ok{counts}"),
            Self::Answer(number, Err(why)) => write!(f, "{MARK}{number} error {why}"),
        }
    }
}

impl FromStr for Line {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let said = text.strip_prefix(MARK).ok_or(())?;
        let (first, rest) = said.split_once(' ').unwrap_or((said, ""));
        match first {
            "ready" => Ok(Self::Ready(rest.parse()?)),
            "wrong" => Ok(Self::Wrong(rest.to_owned())),
            number => {
                let number = number.parse().map_err(|_| ())?;
                let (verdict, rest) = rest.split_once(' ').unwrap_or((rest, ""));
                match verdict {
                    "ok" => Ok(Self::Answer(number, Ok(rest.parse()?))),
                    "error" => Ok(Self::Answer(number, Err(rest.to_owned()))),
                    _ => Err(()),
                }
            }
        }
    }
}

// The guest's program is this file too, and has no tests.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_as_they_are_written_and_nothing_else_is() {
        for command in [
            Command::Ping,
            Command::Alloc { pages: 7 },
            Command::Free,
            Command::Fill,
            Command::Sweep,
            Command::Hot { pages: 3, per_second: 50 },
            Command::Disk { per_second: 0 },
            Command::Idle,
            Command::Report,
            Command::Off,
        ] {
            assert_eq!(command.to_string().parse(), Ok(command));
        }
        for other in ["", "pin", "ping 1", "alloc", "alloc -1", "alloc x", "hot 1", "hot 1 2 3"] {
            assert_eq!(other.parse::<Command>(), Err(UnknownCommand(other.to_owned())));
        }
    }

    #[test]
    fn lines_are_read_as_they_are_written_and_noise_is_passed_over() {
        let counts = Counts::from([("wrong", 0), ("pages", 12)]);
        for line in [
            Line::Ready(counts.clone()),
            Line::Ready(Counts::default()),
            Line::Wrong("memory number=1 word=2".to_owned()),
            Line::Answer(3, Ok(Counts::default())),
            Line::Answer(4, Ok(counts)),
            Line::Answer(5, Err("no disk: it is gone".to_owned())),
        ] {
            assert_eq!(line.to_string().parse(), Ok(line));
        }
        for noise in [
            "",
            "[    1.0] virtio_blk virtio1: [vda]",
            "plimsoll",
            "plimsoll x ok",
            "plimsoll 1 fine",
            "plimsoll 1 ok a=b",
        ] {
            assert_eq!(noise.parse::<Line>(), Err(()), "{noise}");
        }
    }
}
