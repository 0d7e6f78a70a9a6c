//! The conversation with a guest.
//!
//! Enters: commands. Leaves: answers, each within the time its asker is ready to wait, and the wrong words that the guest
//! found meanwhile. What must never happen: an answer taken for that to another question. Numbers are therefore never used
//! twice by this process, not even with another guest, for a guest that moves takes unanswered questions along.
use crate::protocol::{Command, Counts, Line};
use crate::wire::{Wire, WireError};
use plimsoll_types::{ByteCount, PageCount};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

static NEXT_QUESTION: AtomicU64 = AtomicU64::new(1);

/// No answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConsoleError {
    /// The guest did not answer, or is not there any more.
    #[error("no answer from the guest to `{asked}` within {} s", .within.as_secs())]
    NoAnswer {
        /// What was asked.
        asked: String,
        /// How long was waited.
        within: Duration,
        /// Why.
        #[source]
        source: WireError,
    },
    /// The guest will not do it.
    #[error("the guest refuses `{asked}`: {why}")]
    Refused {
        /// What was asked.
        asked: String,
        /// What it said.
        why: String,
    },
    /// The answer lacks a count.
    #[error("the guest's answer has no {0}: is its program as old as this one?")]
    Incomplete(&'static str),
}

/// A question that was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the guest answers it"]
pub struct Question {
    number: u64,
    command: Command,
}

/// What a guest has done since it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Pages of the hot set verified.
    pub operations: u64,
    /// How many of them were then written anew.
    pub rewrites: u64,
    /// Blocks read and verified.
    pub disk_reads: u64,
    /// Blocks written.
    pub disk_writes: u64,
    /// Words that were not what they should be: memory, disk, and buffers the disk was read into.
    pub wrong: u64,
    /// Pages the guest program has.
    pub pages: PageCount,
    /// Pages of them that were touched since the last report: the true working set.
    pub touched: PageCount,
    /// What the guest's kernel says is available.
    pub available: ByteCount,
    /// The time on the guest's clock since it became ready; two reports give a throughput.
    pub uptime: Duration,
}

impl Report {
    fn read(counts: &Counts) -> Result<Self, ConsoleError> {
        let count = |name| counts.get(name).ok_or(ConsoleError::Incomplete(name));
        Ok(Self {
            operations: count("operations")?,
            rewrites: count("rewrites")?,
            disk_reads: count("disk_reads")?,
            disk_writes: count("disk_writes")?,
            wrong: count("wrong")?,
            pages: PageCount(count("pages")?),
            touched: PageCount(count("touched")?),
            available: ByteCount(count("available_kib")?.saturating_mul(1024)),
            uptime: Duration::from_millis(count("uptime_ms")?),
        })
    }
}

/// A line to a guest.
#[derive(Debug)]
pub struct Console {
    wire: Wire,
    answers: BTreeMap<u64, Result<Counts, String>>,
    wrongs: Vec<String>,
    is_ready: bool,
}

impl Console {
    pub(crate) const fn new(wire: Wire) -> Self {
        Self { wire, answers: BTreeMap::new(), wrongs: Vec::new(), is_ready: false }
    }

    /// Waits until the guest can be asked.
    pub(crate) fn wait_ready(&mut self, within: Duration) -> Result<(), ConsoleError> {
        let deadline = Instant::now() + within;
        while !self.is_ready {
            self.listen(deadline).map_err(|source| ConsoleError::NoAnswer {
                asked: "ready?".to_owned(),
                within,
                source,
            })?;
        }
        Ok(())
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// When the guest refuses, does not answer in time or has ended.
    pub fn ask(&mut self, command: Command, within: Duration) -> Result<Counts, ConsoleError> {
        let question = self.send(command)?;
        self.answer(question, within)
    }

    /// Asks, and does not wait.
    ///
    /// # Errors
    /// When the guest has ended.
    pub fn send(&mut self, command: Command) -> Result<Question, ConsoleError> {
        let number = NEXT_QUESTION.fetch_add(1, Ordering::Relaxed);
        let failed =
            |source| ConsoleError::NoAnswer { asked: command.to_string(), within: Duration::ZERO, source };
        self.wire.say(&format!("{number} {command}")).map_err(failed)?;
        Ok(Question { number, command })
    }

    /// Waits for the answer to a question, which may be one that was asked before the guest moved here.
    ///
    /// # Errors
    /// When the guest refuses, does not answer in time or has ended. A question not answered in time can be waited for again.
    pub fn answer(&mut self, question: Question, within: Duration) -> Result<Counts, ConsoleError> {
        let deadline = Instant::now() + within;
        let asked = || question.command.to_string();
        loop {
            if let Some(answer) = self.answers.remove(&question.number) {
                return answer.map_err(|why| ConsoleError::Refused { asked: asked(), why });
            }
            self.listen(deadline).map_err(|source| ConsoleError::NoAnswer {
                asked: asked(),
                within,
                source,
            })?;
        }
    }

    /// What the guest has done, and a new window of its working set.
    ///
    /// # Errors
    /// Those of [`ask`](Self::ask).
    pub fn report(&mut self, within: Duration) -> Result<Report, ConsoleError> {
        Report::read(&self.ask(Command::Report, within)?)
    }

    /// The first wrong words the guest found, in its own words.
    pub fn wrongs(&self) -> &[String] {
        &self.wrongs
    }

    fn listen(&mut self, deadline: Instant) -> Result<(), WireError> {
        match self.wire.next(deadline)?.parse() {
            Ok(Line::Ready(_)) => self.is_ready = true,
            Ok(Line::Wrong(place)) => self.wrongs.push(place),
            Ok(Line::Answer(number, answer)) => drop(self.answers.insert(number, answer)),
            // No part of the conversation.
            Err(()) => {}
        }
        Ok(())
    }
}
