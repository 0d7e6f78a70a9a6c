//! Decisions on record, and the same decisions made again.
//!
//! Enters: what each decision rests on and what came of it. Leaves: a file, and from it the same decisions once more, with the
//! first difference if there is one. What must never happen: a record that says something else than what was decided on, or
//! one that a killed recorder leaves unreadable.
//!
//! ```text
//! file    = one zstd frame of lines, flushed after each decision; a recorder that is killed leaves it without its end
//! line    = a JSON object of one member
//!   {"begin":    {"version": 2, "by": "plimsoll 0.1.0"}}                         the first line
//!   {"settings": {"state": PolicyState, "names": [[id, name], ...], "own": bytes}}  the second line, and before each decision
//!                                                                                that rests on other machines or settings
//!   {"tick":     {"view": HostView, "plan": Plan, "outcomes": [...],
//!                 "overheads": [[id, [predicted, measured]], ...]}}              each decision
//! ```
//!
//! Version 2 has losses in the settings' costs, and in reasons what a rung was held against. Version 1 has neither and is read: where no
//! loss is known price alone decides, as it did.
//!
//! A decision depends on the view and on the state before it, and nothing else; so replaying starts from the first state and
//! takes over settings where they changed. The state of every later `settings` line must come out by itself.
use crate::backend::Overhead;
use crate::control::Outcome;
use plimsoll_policy::view::HostView;
use plimsoll_policy::{Plan, PolicyState, decide};
use plimsoll_types::{ByteCount, MachineId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read, Write};
use std::path::Path;
use thiserror::Error;

/// The version written, and the newest that is read.
pub const VERSION: u32 = 2;
/// How a zstd frame begins (RFC 8878, 3.1.1).
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// zstd's level: records are alike, so the fastest one leaves a tenth.
const LEVEL: i32 = 1;
/// No decision about 100,000 machines takes more; a longer line is none of ours.
const LINE_MAX: u64 = 256 << 20;

/// One decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tick {
    /// What was seen.
    pub view: HostView,
    /// What was decided.
    pub plan: Plan,
    /// What became of it.
    pub outcomes: Vec<Outcome>,
    /// What each machine costs besides its guest's pages: as predicted, and as last measured.
    pub overheads: Vec<(MachineId, (ByteCount, Overhead))>,
}

/// What decisions rest on besides what is seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Basis {
    /// What was remembered, settings included.
    pub state: PolicyState,
    /// The machines' names.
    pub names: Vec<(MachineId, String)>,
    /// What of the host's memory is not for machines.
    pub own: ByteCount,
}

/// The first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Begin {
    version: u32,
    #[serde(default)]
    by: String,
}

/// A line that is written.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Written<'a> {
    Begin(&'a Begin),
    Settings(&'a Basis),
    Tick(&'a Tick),
}

/// A line that is read.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// What the decisions that follow rest on.
    Settings(Box<Basis>),
    /// A decision.
    Tick(Box<Tick>),
}

/// A record cannot be written or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The file cannot be opened, read or written.
    #[error("the record {path:?} cannot be used")]
    File {
        /// Its path.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It was not made by a recorder.
    #[error("{path:?} is no record of decisions: give a file that `plimsoll manage --record` has written")]
    Foreign {
        /// Its path.
        path: String,
    },
    /// It was made by a newer plimsoll.
    #[error(
        "{path:?} is a record of version {found}, and this plimsoll reads up to {VERSION}: use a newer one"
    )]
    Newer {
        /// Its path.
        path: String,
        /// Its version.
        found: u32,
    },
    /// It ends before its end: its recorder was killed, or the file was cut off.
    #[error(
        "{path:?} is cut off after {ticks} whole decisions: its recorder was killed, or the disk was full"
    )]
    Truncated {
        /// Its path.
        path: String,
        /// Decisions that could be read.
        ticks: u64,
    },
    /// Its bytes are not those that were written.
    #[error("{path:?} is damaged after {ticks} whole decisions: use a copy that is not")]
    Corrupt {
        /// Its path.
        path: String,
        /// Decisions that could be read.
        ticks: u64,
    },
}

/// Writes a record. What a decision has written is in the file when the next begins.
pub struct Recorder {
    path: String,
    out: zstd::Encoder<'static, File>,
    line: Vec<u8>,
}

impl Recorder {
    /// Makes a new file, in place of one that is there.
    ///
    /// # Errors
    /// [`TraceError::File`].
    pub fn create(path: &Path) -> Result<Self, TraceError> {
        let shown = path.display().to_string();
        let failed = |source| TraceError::File { path: shown.clone(), source };
        let out = File::create(path).and_then(|file| zstd::Encoder::new(file, LEVEL)).map_err(failed)?;
        let mut recorder = Self { path: shown, out, line: Vec::new() };
        let by = concat!("plimsoll ", env!("CARGO_PKG_VERSION")).to_owned();
        recorder.write(&Written::Begin(&Begin { version: VERSION, by }))?;
        Ok(recorder)
    }

    /// What the next decision rests on.
    ///
    /// # Errors
    /// [`TraceError::File`].
    pub fn settings(&mut self, basis: &Basis) -> Result<(), TraceError> {
        self.write(&Written::Settings(basis))
    }

    /// A decision.
    ///
    /// # Errors
    /// [`TraceError::File`].
    pub fn tick(&mut self, tick: &Tick) -> Result<(), TraceError> {
        self.write(&Written::Tick(tick))
    }

    fn write(&mut self, record: &Written<'_>) -> Result<(), TraceError> {
        let failed = |source| TraceError::File { path: self.path.clone(), source };
        self.line.clear();
        serde_json::to_writer(&mut self.line, record).map_err(|error| failed(error.into()))?;
        self.line.push(b'\n');
        self.out.write_all(&self.line).and_then(|()| self.out.flush()).map_err(failed)
    }

    /// Ends the file.
    ///
    /// # Errors
    /// [`TraceError::File`].
    pub fn finish(self) -> Result<(), TraceError> {
        let Self { path, out, .. } = self;
        out.finish().map(drop).map_err(|source| TraceError::File { path, source })
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Reads a record, line by line.
pub struct Reader {
    path: String,
    lines: BufReader<Box<dyn Read + Send>>,
    ticks: u64,
    is_over: bool,
}

impl Reader {
    /// Opens a file and checks its first line.
    ///
    /// # Errors
    /// [`TraceError`].
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        let shown = path.display().to_string();
        let failed = |source| TraceError::File { path: shown.clone(), source };
        let mut file = File::open(path).map_err(failed)?;
        let mut magic = Vec::with_capacity(MAGIC.len());
        (&mut file).take(MAGIC.len() as u64).read_to_end(&mut magic).map_err(failed)?;
        if magic != MAGIC {
            return Err(TraceError::Foreign { path: shown });
        }
        let plain = zstd::Decoder::new(Cursor::new(magic).chain(file)).map_err(failed)?;
        let mut reader =
            Self { path: shown, lines: BufReader::new(Box::new(plain)), ticks: 0, is_over: false };
        reader.check_first()?;
        Ok(reader)
    }

    fn check_first(&mut self) -> Result<(), TraceError> {
        #[derive(Deserialize)]
        struct First {
            begin: Begin,
        }
        let foreign = || TraceError::Foreign { path: self.path.clone() };
        let line = match next_line(&mut self.lines) {
            Ok(line) => line.ok_or_else(foreign)?,
            Err(error) => return Err(self.damage(error.kind() == io::ErrorKind::UnexpectedEof)),
        };
        let First { begin } = serde_json::from_slice(&line).map_err(|_| foreign())?;
        if begin.version > VERSION {
            return Err(TraceError::Newer { path: self.path.clone(), found: begin.version });
        }
        Ok(())
    }

    fn damage(&mut self, is_cut: bool) -> TraceError {
        self.is_over = true;
        let (path, ticks) = (self.path.clone(), self.ticks);
        if is_cut { TraceError::Truncated { path, ticks } } else { TraceError::Corrupt { path, ticks } }
    }
}

impl Iterator for Reader {
    type Item = Result<Record, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let line = match next_line(&mut self.lines) {
            Ok(Some(line)) => line,
            Ok(None) => {
                self.is_over = true;
                return None;
            }
            Err(error) => return Some(Err(self.damage(error.kind() == io::ErrorKind::UnexpectedEof))),
        };
        let Ok(record) = serde_json::from_slice(&line) else { return Some(Err(self.damage(false))) };
        self.ticks += u64::from(matches!(record, Record::Tick(_)));
        Some(Ok(record))
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("path", &self.path).field("ticks", &self.ticks).finish_non_exhaustive()
    }
}

/// A whole line, or none at the end.
fn next_line(lines: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    if lines.take(LINE_MAX).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.pop() == Some(b'\n') { Ok(Some(line)) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// What deciding again came to.
#[derive(Debug)]
pub struct Replayed {
    /// Decisions that came out the same.
    pub identical: u64,
    /// The first that did not.
    pub difference: Option<Difference>,
    /// Why not all could be read.
    pub damage: Option<TraceError>,
}

/// A decision that does not come out as it was recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Which: the first is 1.
    pub tick: u64,
    /// When, in milliseconds since the recorder's beginning.
    pub at_ms: u64,
    /// About which machine; none where it concerns the host.
    pub machine: Option<String>,
    /// What was recorded, in words.
    pub recorded: String,
    /// What is decided now, in words.
    pub decided: String,
}

/// Decides everything in a record again, up to the first difference.
pub fn replay(reader: Reader) -> Replayed {
    let mut state: Option<PolicyState> = None;
    compare(reader, |record| match (record, &mut state) {
        (Record::Settings(basis), Some(state)) => {
            state.set_tree(basis.state.tree().clone());
            None
        }
        (Record::Settings(basis), none) => {
            *none = Some(basis.state.clone());
            None
        }
        (Record::Tick(tick), state) => state.as_mut().map(|state| decide(&tick.view, state)),
    })
}

/// Holds decisions that were made again, wherever that was, against a record, up to the first difference. `again` is shown everything on
/// record, and says what was decided about a view.
pub fn compare(reader: Reader, mut again: impl FnMut(&Record) -> Option<Plan>) -> Replayed {
    let (mut identical, mut damage) = (0, None);
    let mut names = BTreeMap::new();
    for record in reader {
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                damage = Some(error);
                continue;
            }
        };
        let decided = again(&record);
        match (record, decided) {
            (Record::Settings(basis), _) => names = basis.names.into_iter().collect(),
            (Record::Tick(tick), Some(decided)) if decided != tick.plan => {
                let difference = difference(identical + 1, &tick, &decided, &names);
                return Replayed { identical, difference: Some(difference), damage };
            }
            (Record::Tick(_), Some(_)) => identical += 1,
            (Record::Tick(_), None) => {}
        }
    }
    Replayed { identical, difference: None, damage }
}

/// The first difference between two plans that differ.
fn difference(number: u64, tick: &Tick, decided: &Plan, names: &BTreeMap<MachineId, String>) -> Difference {
    let recorded = &tick.plan;
    let (machine, recorded, decided) = first_difference(recorded, decided);
    let name = |id: MachineId| names.get(&id).cloned().unwrap_or_else(|| id.to_string());
    Difference { tick: number, at_ms: tick.view.now_ms, machine: machine.map(name), recorded, decided }
}

fn first_difference(recorded: &Plan, decided: &Plan) -> (Option<MachineId>, String, String) {
    if recorded.state != decided.state {
        return (None, format!("the host is {}", recorded.state), format!("the host is {}", decided.state));
    }
    if recorded.budget != decided.budget {
        let said = |plan: &Plan| format!("machines share {} bytes", plan.budget.0);
        return (None, said(recorded), said(decided));
    }
    let positions = pairs(&recorded.machines, &decided.machines);
    if let Some((one, other)) = positions.into_iter().find(|(one, other)| one != other) {
        return (one.or(other).map(|one| one.machine), stands(one), stands(other));
    }
    let actions = pairs(&recorded.actions, &decided.actions);
    if let Some((one, other)) = actions.into_iter().find(|(one, other)| one != other) {
        let said = |action: Option<&plimsoll_policy::Action>| {
            action.map_or_else(nothing, |action| format!("{:?}: {}", action.step, action.reason))
        };
        return (one.or(other).map(|one| one.machine), said(one), said(other));
    }
    let notes = pairs(&recorded.reasons, &decided.reasons);
    let differs = notes.into_iter().find(|(one, other)| one != other);
    let (one, other) = differs.unwrap_or_default();
    let said =
        |note: Option<&plimsoll_policy::Note>| note.map_or_else(nothing, |note| note.reason.to_string());
    (one.or(other).and_then(|one| one.machine), said(one), said(other))
}

fn nothing() -> String {
    "nothing".to_owned()
}

fn stands(position: Option<&plimsoll_policy::Position>) -> String {
    position.map_or_else(nothing, |position| {
        let plimsoll_policy::Position { consumed, active, entitlement, target, .. } = position;
        let (consumed, active, entitlement, target) = (consumed.0, active.0, entitlement.0, target.0);
        format!("consumed {consumed}, active {active}, entitlement {entitlement}, target {target} bytes")
    })
}

/// Both lists side by side, up to the end of the longer one.
fn pairs<'a, T>(one: &'a [T], other: &'a [T]) -> Vec<(Option<&'a T>, Option<&'a T>)> {
    (0..one.len().max(other.len())).map(|place| (one.get(place), other.get(place))).collect()
}
