//! Why: every decision with the numbers it was made from, and as a sentence.
//!
//! Enters: what [`decide`](crate::decide()) saw and concluded. Leaves: values, to be kept, sent, compared and printed.
//! A reason holds what is needed to check the decision by hand; it never holds text.
use crate::balloon::Standing;
use crate::damper::Hold;
use crate::demand::{Basis, SampleFault};
use crate::host_state::HostState;
use crate::ladder::{Choice, Rung};
use crate::part::Ppm;
use crate::settings::Shares;
use core::fmt;
use plimsoll_types::{ByteCount, GroupId};

/// How free memory stands against what is to be free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Room {
    /// The host's state.
    pub state: HostState,
    /// What is free.
    pub free: ByteCount,
    /// What has to be free for what was decided about.
    pub line: ByteCount,
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the host is {}, {} free of {} that are to be", self.state, self.free, self.line)
    }
}

/// What a machine's share lies between, and by what it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Bounds {
    /// What it keeps whatever the others want.
    pub floor: ByteCount,
    /// What its floor is raised by, because it stalls or starts.
    pub lift: ByteCount,
    /// What it never exceeds.
    pub cap: ByteCount,
    /// Its weight.
    pub shares: Shares,
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "between {}", self.floor)?;
        if self.lift > ByteCount(0) {
            write!(f, " raised by {}", self.lift)?;
        }
        write!(f, " and {}", self.cap)
    }
}

/// What a machine has and needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Need {
    /// What it takes up.
    pub consumed: ByteCount,
    /// What it uses.
    pub active: ByteCount,
    /// What it is to have if there is enough.
    pub wanted: ByteCount,
    /// What `active` rests on.
    pub basis: Basis,
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { consumed, active, wanted, basis } = self;
        write!(f, "it has {consumed}, uses {active} ({basis}) and wants {wanted}")
    }
}

/// Why something was done, or was not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
#[expect(missing_docs, reason = "each variant says what its fields are, or they have the types that do")]
pub enum Reason {
    /// A machine's target moved. `due` is what the numbers of the moment give; `budget` what all machines share; `tax`
    /// what idle memory is taxed.
    TargetMoved {
        from: ByteCount,
        to: ByteCount,
        due: ByteCount,
        need: Need,
        bounds: Bounds,
        budget: ByteCount,
        tax: Ppm,
    },
    /// A machine's target was left where it is although another one is due.
    TargetHeld { target: ByteCount, due: ByteCount, hold: Hold },
    /// Memory is taken: the machine has more than its target, and this rung costs `price_ns` a freed page. `choice` is what it was
    /// held against.
    Taken {
        need: Need,
        target: ByteCount,
        rung: Rung,
        price_ns: u64,
        returns: Ppm,
        #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
        choice: Option<Choice>,
        room: Room,
    },
    /// The balloon is to hold more, so that the machine comes down to its target. Of what it has above the target only
    /// a part, `appetite`, is taken at once. `choice` is what a balloon was held against.
    BalloonGrows {
        from: ByteCount,
        to: ByteCount,
        target: ByteCount,
        appetite: Ppm,
        #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
        choice: Option<Choice>,
        room: Room,
    },
    /// The balloon gives back, so that the machine may have its target.
    BalloonShrinks { from: ByteCount, to: ByteCount, target: ByteCount, room: Room },
    /// The machine may have more, but memory has to be free before it is granted: this much of it waits.
    WaitsForFree { waits: ByteCount, target: ByteCount, room: Room },
    /// The balloon stands still, so it is not counted on. `still_ms` is how long.
    BalloonStuck { standing: Standing, asked: ByteCount, held: ByteCount, still_ms: u64 },
    /// The machine has more than its target, and nothing it is allowed to lose covers `left` of it. `highest` is the
    /// last rung it and the host's state allow.
    Uncovered { left: ByteCount, target: ByteCount, highest: Option<Rung> },
    /// The machine, or those of a group it is in, take up so much more than a limit, which holds however much is free.
    AboveLimit { above: ByteCount, group: Option<GroupId> },
    /// The machine is stalled: the host cannot go on otherwise, and it has more than it is due.
    Stalled { consumed: ByteCount, target: ByteCount, room: Room },
    /// The machine may run again.
    Resumed { consumed: ByteCount, target: ByteCount, room: Room },
    /// Its processors wait longer than promised: its floor rises by `lift` in all, and only `appetite` of what could
    /// be is taken.
    OverObjective { stalled: Ppm, objective: Ppm, lift: ByteCount, appetite: Ppm },
    /// A number could not be believed.
    BadSample { fault: SampleFault },
    /// The host's state changed.
    StateChanged { from: HostState, room: Room },
    /// More is guaranteed than the host has.
    Short { floors: ByteCount, budget: ByteCount, short: ByteCount },
    /// The host shows a machine nobody has settings for. It is left alone.
    UnknownMachine,
    /// The host shows a machine twice. The first counts.
    ShownTwice,
    /// The host shows more free memory than it has.
    FreeAboveTotal { free: ByteCount, total: ByteCount },
    /// The host's clock went back. No time is taken to have passed.
    ClockWentBack { from_ms: u64, to_ms: u64 },
}

/// What holds always.
const ALWAYS: &str = "its limit, which holds however much is free";

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TargetMoved { from, to, due, need, bounds, budget, tax } => {
                write!(f, "its target goes from {from} to {to}")?;
                if to != due {
                    write!(f, " ({due} is due)")?;
                }
                write!(
                    f,
                    ": {need}; of {budget} for all machines {} shares earn it that much, idle memory taxed by {tax}, \
                     {bounds}",
                    bounds.shares.0
                )
            }
            Self::TargetHeld { target, due, hold } => {
                write!(f, "its target stays at {target} although {due} is due: {hold}")
            }
            Self::Taken { need, target, rung, price_ns, returns, choice, room } => {
                write!(
                    f,
                    "it is taken from by {rung}: its target is {target}, {need}; this costs {} us a freed page where \
                     {returns} come back",
                    price_ns / 1000
                )?;
                choice.iter().try_for_each(|choice| write!(f, "{choice}"))?;
                write!(f, "; {room}")
            }
            Self::BalloonGrows { from, to, target, appetite, choice, room } => {
                write!(
                    f,
                    "its balloon goes from {from} to {to}: its target is {target}, of what is above it {appetite} are \
                     taken"
                )?;
                choice.iter().try_for_each(|choice| write!(f, "{choice:#}"))?;
                write!(f, "; {room}")
            }
            Self::BalloonShrinks { from, to, target, room } => {
                write!(f, "its balloon goes from {from} down to {to}: its target is {target}; {room}")
            }
            Self::WaitsForFree { waits, target, room } => {
                write!(f, "{waits} of its target of {target} wait until they are free: {room}")
            }
            Self::BalloonStuck { standing, asked, held, still_ms } => write!(
                f,
                "its balloon is {standing}: it holds {held} of {asked} and has stood still for {} s",
                still_ms / 1000
            ),
            Self::Uncovered { left, target, highest } => {
                write!(f, "{left} above its target of {target} cannot be taken: ")?;
                match highest {
                    Some(rung) => write!(f, "the last way allowed is {rung}"),
                    None => f.write_str("no way is allowed"),
                }
            }
            Self::AboveLimit { above, group: None } => write!(f, "it takes up {above} more than {ALWAYS}"),
            Self::AboveLimit { above, group: Some(group) } => {
                write!(f, "the machines of {group} take up {above} more than {ALWAYS}")
            }
            Self::Stalled { consumed, target, room } => {
                write!(f, "it is stalled: it has {consumed}, more than its target of {target}; {room}")
            }
            Self::Resumed { consumed, target, room } => {
                write!(f, "it runs again: it has {consumed}, its target is {target}; {room}")
            }
            Self::OverObjective { stalled, objective, lift, appetite } => write!(
                f,
                "its processors wait {stalled} of the time, more than the {objective} promised: its floor is raised \
                 by {lift} in all, and of what could be taken {appetite} are"
            ),
            Self::BadSample { fault } => write!(f, "{fault}: it is not used"),
            Self::StateChanged { from, room } => write!(f, "no longer {from}: {room}"),
            Self::Short { floors, budget, short } => write!(
                f,
                "{floors} are guaranteed, but machines have {budget} between them: {short} are missing; free memory \
                 elsewhere or move a machine away"
            ),
            Self::UnknownMachine => {
                f.write_str("nothing is known about it: it is left alone until it has settings")
            }
            Self::ShownTwice => f.write_str("the host shows it twice: the first counts"),
            Self::FreeAboveTotal { free, total } => {
                write!(f, "the host shows {free} free of {total}: it is taken to be all free")
            }
            Self::ClockWentBack { from_ms, to_ms } => {
                write!(
                    f,
                    "the clock went back from {from_ms} ms to {to_ms} ms: no time is taken to have passed"
                )
            }
        }
    }
}
