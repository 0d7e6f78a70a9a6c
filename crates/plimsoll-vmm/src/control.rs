//! The control socket: how the machine's starter hears from it and tells it to stop.
//!
//! Enters: JSON lines from the starter ([`Command`]). Leaves: JSON lines to it ([`Event`]). One line is one message; the
//! stream carries nothing else. The starter is trusted (it wrote the configuration), but a line of it that makes no
//! sense is answered with an `error` event and ignored, because a machine must not die of a typing error.
//!
//! Only the machine's main thread uses this, so a starter that does not read delays reports and nothing else.
use crate::probe::Accel;
use crate::report::{ProbeReport, Summary};
use plimsoll_guest::abi;
use plimsoll_guest::probe::ProbeCommand;
use plimsoll_sys::HvaRange;
use plimsoll_sys::mapping::Merging;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Longest line the starter may send.
const LINE_MAX: usize = 4096;

/// What the machine tells its starter.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Memory is being touched before the guest starts.
    Prefault {
        /// Bytes touched so far.
        done_bytes: u64,
        /// Bytes of all memory.
        total_bytes: u64,
    },
    /// The vCPUs run.
    Started {
        /// The machine's name.
        name: String,
        /// Its process.
        pid: u32,
        /// What runs it.
        accel: Accel,
        /// Its identity under its manager, if it has one.
        machine: Option<u32>,
        /// How many vCPUs it has.
        vcpus: u32,
        /// Ticks of the guest's clock in a second.
        tsc_hz: u64,
        /// Where its memory is in its process, region by region in the order of guest addresses.
        ram: Vec<Ram>,
    },
    /// What the vCPUs say.
    Report(Summary),
    /// A probing guest has done what it was asked.
    Probed(ProbeReport),
    /// A range was offered to the kernel's samepage merging or withdrawn from it, or could not be.
    Merging {
        /// What was asked.
        #[serde(flatten)]
        range: MergeRange,
        /// Why it was not done, for the operator.
        refused: Option<String>,
    },
    /// The balloon has what was asked, or what the guest could give.
    Ballooned {
        /// What was asked last.
        target_bytes: u64,
        /// What it has.
        ballooned_bytes: u64,
        /// From the command's arrival to the guest's word that it is done.
        ns: u64,
    },
    /// An order about the guest's frames is done.
    Frames {
        /// The order.
        #[serde(flatten)]
        order: FrameOrder,
        /// Bytes of the frames it took or gave back; fewer than asked where no more were free or held.
        done_bytes: u64,
        /// Bytes of them that were dropped; the others had no memory. A guest can lie about that, to its own harm.
        dropped_bytes: u64,
        /// From the command's arrival to its end.
        ns: u64,
        /// Why it ended early, for the operator.
        refused: Option<String>,
    },
    /// A vCPU's registers, or why they cannot be had.
    Registers {
        /// Which vCPU.
        vcpu: u32,
        /// What they are. It goes on with them.
        registers: Option<Box<Registers>>,
        /// How long it stood still for it, outside of KVM.
        stalled_ns: u64,
        /// Why there are none, for the operator.
        refused: Option<String>,
    },
    /// No vCPU runs the guest until [`Command::Release`], or until whoever asked hangs up, the machine is to stop, its manager is lost, or two
    /// minutes are over; but for the first two an [`Event::Error`] says so. What the starter orders meanwhile is still written to the
    /// guest's memory: commands, targets and orders of frames.
    Held,
    /// Answers [`Command::Release`] of an inspector that held the machine to the end. Any other is answered with [`Event::Error`].
    Released,
    /// The manager is gone. Pages that are not present stay out of reach: the guest stalls and never reads zeros.
    ManagerLost,
    /// The manager has given the machine back: all its pages are here, and the kernel serves it from now on.
    GivenBack,
    /// A command made no sense.
    Error {
        /// Why.
        message: String,
    },
    /// A vCPU cannot go on; the others are being stopped.
    Died {
        /// Which vCPU.
        vcpu: u32,
        /// Why, for the operator.
        reason: String,
    },
    /// All vCPUs have ended. The last event.
    Done(Summary),
}

/// What the starter tells the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// End. Whoever sends nothing and closes the socket has said this, with `mode` `now`.
    Stop {
        /// How.
        mode: StopMode,
    },
    /// A new window of the true working set begins.
    Window {
        /// Its number, which should grow by one each time.
        number: u64,
    },
    /// A probing guest shall do something, after what it was asked before. It answers with [`Event::Probed`].
    Probe {
        /// Which vCPU.
        vcpu: u32,
        /// What; the number is given by the machine.
        #[serde(with = "ProbeFields")]
        probe: ProbeCommand,
    },
    /// Pages of the machine shall be merged with others of the host that have the same bytes (KSM), or not any more; only
    /// this process can tell the kernel. Whoever asks sees to it that no machine of another sharing domain may be merged.
    /// Answered with [`Event::Merging`].
    Merge(MergeRange),
    /// The balloon of a guest that keeps frames shall have so much. Answered with [`Event::Ballooned`]; set one target at a time.
    Balloon {
        /// How much: whole pages, or frames, at most.
        target_bytes: u64,
        /// In what pieces it takes more.
        piece: BalloonPiece,
    },
    /// Frames of such a guest shall be taken without asking it, or given back. Answered with [`Event::Frames`].
    Frames(FrameOrder),
    /// A vCPU shall say its registers when it next leaves KVM, which is at once. Answered with [`Event::Registers`]; ask one at a time.
    Registers {
        /// Which vCPU.
        vcpu: u32,
    },
    /// All vCPUs shall stand still, on the inspection socket only. Answered with [`Event::Held`] when they do.
    Hold,
    /// They go on.
    Release,
}

/// What a vCPU has in its registers: all that translates its addresses, and that a debugger asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, R8 to R15.
    pub general: [u64; 16],
    /// The instruction pointer.
    pub rip: u64,
    /// The flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS, LDT, TR.
    pub segments: [Segment; 8],
    /// The descriptor tables: of segments, of interrupts. Base and limit.
    pub tables: [(u64, u64); 2],
    /// CR0, CR2, CR3, CR4.
    pub control: [u64; 4],
    /// EFER.
    pub efer: u64,
    /// The current privilege level.
    pub privilege: u64,
}

/// A segment register with what is hidden in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// The selector.
    pub selector: u64,
    /// Where it begins.
    pub base: u64,
    /// How long it is, less one.
    pub limit: u64,
    /// Bits 23:8 of the descriptor's upper half, where they are there.
    pub flags: u64,
}

/// The pieces in which a balloon takes memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalloonPiece {
    /// 4 KiB, up to 256 of them with one exit.
    Page,
    /// The same, each from another frame than the one before: what a guest lists whose free memory is fragmented.
    ScatteredPage,
    /// 2 MiB, as many.
    Frame,
}

/// What is to be done with a guest's frames, and with how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrameOrder {
    /// What.
    pub order: FrameVerb,
    /// How much; what is left after whole frames of 2 MiB is ignored.
    pub bytes: u64,
}

/// What can be done with frames that the guest does not use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FrameVerb {
    /// Take the memory of those that have some; the guest gets it by asking.
    TakeSoftly,
    /// Take them out of circulation, those that have no memory too.
    TakeForGood,
    /// Give those back that were taken for good, the last first.
    GiveBack,
}

/// Whole pages of one region of guest memory, and whether they may be merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeRange {
    /// The first byte in the guest.
    pub gpa: u64,
    /// How many bytes.
    pub bytes: u64,
    /// What they are to be.
    pub merging: MergeMode,
}

impl MergeRange {
    /// Names a range of the machine's process by the guest's addresses, where it is inside of one region.
    pub fn in_guest(ram: &[Ram], range: HvaRange, merging: Merging) -> Option<Self> {
        let merging = match merging {
            Merging::Offered => MergeMode::Offered,
            Merging::Withdrawn => MergeMode::Withdrawn,
        };
        let bytes = range.len().0;
        ram.iter().find_map(|ram| {
            let offset = range.start().0.checked_sub(ram.hva)?;
            let is_inside = offset.checked_add(bytes).is_some_and(|end| end <= ram.bytes);
            is_inside.then_some(Self { gpa: ram.gpa + offset, bytes, merging })
        })
    }
}

/// Whether pages may be merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MergeMode {
    /// They may.
    Offered,
    /// They may not, and are the machine's own again.
    Withdrawn,
}

/// The fields of [`ProbeCommand`], which itself lives in a crate that knows no serialisation.
#[derive(Serialize, Deserialize)]
#[serde(remote = "ProbeCommand", deny_unknown_fields)]
struct ProbeFields {
    number: u64,
    task: u32,
    order: u32,
    first_page: u64,
    pages: u64,
    stride: u64,
    seed: u64,
    passes: u64,
    pause_ns: u64,
}

/// Where a region of guest memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ram {
    /// Its first byte in the guest.
    pub gpa: u64,
    /// Its first byte in the machine's process.
    pub hva: u64,
    /// How many bytes.
    pub bytes: u64,
}

/// How to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopMode {
    /// After the operation at hand and, if the workload asks for it, a check of every page.
    Finish,
    /// After the operation at hand. vCPUs that wait for a page that nobody brings are abandoned after a while.
    Now,
}

impl StopMode {
    /// The guest's word for it.
    pub(crate) const fn word(self) -> u64 {
        match self {
            Self::Finish => abi::STOP_FINISH,
            Self::Now => abi::STOP_NOW,
        }
    }
}

/// The machine's end of the socket.
#[derive(Debug)]
pub(crate) struct Control {
    socket: OwnedFd,
    /// Bytes of a line whose end has not come yet.
    pending: Vec<u8>,
    /// Set when the line being received is too long: its rest is thrown away.
    skipping: Skipping,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Skipping {
    No,
    ToEndOfLine,
}

/// What one reading of the socket gave.
#[derive(Debug, Default)]
pub(crate) struct Received {
    /// Commands, in order.
    pub(crate) commands: Vec<Command>,
    /// What was wrong with lines that are none.
    pub(crate) errors: Vec<String>,
    /// The starter has closed its end.
    pub(crate) closed: bool,
}

impl Control {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket, pending: Vec::new(), skipping: Skipping::No }
    }

    /// Sends an event. A starter that is gone is noticed by [`receive`](Self::receive), so that is no error here.
    pub(crate) fn send(&self, event: &Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        let mut rest = line.as_slice();
        while !rest.is_empty() {
            match rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Takes what has arrived, without waiting.
    pub(crate) fn receive(&mut self) -> io::Result<Received> {
        let mut received = Received::default();
        let mut buffer = [0; LINE_MAX];
        loop {
            match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::CONNRESET) => {
                    received.closed = true;
                    return Ok(received);
                }
                Ok((bytes, _)) => buffer.iter().take(bytes).for_each(|byte| self.take(*byte, &mut received)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(received),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn take(&mut self, byte: u8, received: &mut Received) {
        if byte != b'\n' {
            if self.skipping == Skipping::No {
                self.pending.push(byte);
            }
            if self.pending.len() > LINE_MAX {
                self.pending.clear();
                self.skipping = Skipping::ToEndOfLine;
                received.errors.push(format!("a line of more than {LINE_MAX} bytes was ignored"));
            }
            return;
        }
        if self.skipping == Skipping::No && !self.pending.is_empty() {
            match serde_json::from_slice(&self.pending) {
                Ok(command) => received.commands.push(command),
                Err(error) => received.errors.push(format!("a line is no command: {error}")),
            }
        }
        self.pending.clear();
        self.skipping = Skipping::No;
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_guest::probe::{Order, Task};
    use plimsoll_types::{ByteCount, Hva};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (Control, UnixStream) {
        let (own, other) = UnixStream::pair().unwrap();
        (Control::new(own.into()), other)
    }

    #[test]
    fn commands_are_found_however_the_stream_is_cut() {
        let (mut control, mut starter) = pair();
        let text = b"{\"command\":\"window\",\"number\":7}\n\n{\"command\":\"stop\",\"mode\":\"finish\"}\n";
        let mut commands = Vec::new();
        for byte in text {
            starter.write_all(&[*byte]).unwrap();
            commands.extend(control.receive().unwrap().commands);
        }
        assert_eq!(commands, [Command::Window { number: 7 }, Command::Stop { mode: StopMode::Finish }]);
        drop(starter);
        assert!(control.receive().unwrap().closed);
    }

    #[test]
    fn a_probe_survives_json() {
        let (mut control, mut starter) = pair();
        let probe = ProbeCommand { stride: 7, ..ProbeCommand::new(Task::Write, Order::Strided) };
        let command = Command::Probe { vcpu: 3, probe };
        starter.write_all(format!("{}\n", serde_json::to_string(&command).unwrap()).as_bytes()).unwrap();
        assert_eq!(control.receive().unwrap().commands, [command]);
    }

    #[test]
    fn a_range_to_merge_survives_json_and_its_answer_names_it() {
        let (mut control, mut starter) = pair();
        let range = MergeRange { gpa: 2 << 20, bytes: 4 << 20, merging: MergeMode::Offered };
        let line = serde_json::to_string(&Command::Merge(range)).unwrap();
        assert_eq!(line, "{\"command\":\"merge\",\"gpa\":2097152,\"bytes\":4194304,\"merging\":\"offered\"}");
        starter.write_all(format!("{line}\n").as_bytes()).unwrap();
        assert_eq!(control.receive().unwrap().commands, [Command::Merge(range)]);
        let answer = serde_json::to_string(&Event::Merging { range, refused: None }).unwrap();
        let Event::Merging { range: named, refused: None } = serde_json::from_str(&answer).unwrap() else {
            panic!("{answer}");
        };
        assert_eq!(named, range);
    }

    #[test]
    fn a_range_is_asked_for_by_the_guests_addresses_and_only_inside_of_one_region() {
        const MIB: u64 = 1 << 20;
        let ram = [
            Ram { gpa: 0, hva: 0x7000_0000_0000, bytes: 64 * MIB },
            Ram { gpa: 4096 * MIB, hva: 0x7100_0000_0000, bytes: 64 * MIB },
        ];
        let asked = |hva: u64, bytes: u64| {
            let range = HvaRange::new(Hva(hva), ByteCount(bytes)).unwrap();
            MergeRange::in_guest(&ram, range, Merging::Offered).map(|asked| (asked.gpa, asked.bytes))
        };
        assert_eq!(asked(0x7000_0000_0000 + 2 * MIB, 4 * MIB), Some((2 * MIB, 4 * MIB)));
        assert_eq!(asked(0x7100_0000_0000 + 62 * MIB, 2 * MIB), Some((4158 * MIB, 2 * MIB)));
        assert_eq!(asked(0x7000_0000_0000 + 62 * MIB, 4 * MIB), None);
        assert_eq!(asked(0x6fff_0000_0000, 2 * MIB), None);
    }

    #[test]
    fn nonsense_is_answered_and_what_follows_is_still_understood() {
        let (mut control, mut starter) = pair();
        starter.write_all(b"hello\n{\"command\":\"explode\"}\n").unwrap();
        starter.write_all(&[b'x'; LINE_MAX + 100]).unwrap();
        starter.write_all(b"\n{\"command\":\"window\",\"number\":1}\n").unwrap();
        let received = control.receive().unwrap();
        assert_eq!(received.errors.len(), 3, "{:?}", received.errors);
        assert_eq!(received.commands, [Command::Window { number: 1 }]);
        assert!(!received.closed);
    }

    #[test]
    fn an_event_is_one_line_and_a_starter_that_is_gone_is_no_error() {
        let (control, mut starter) = pair();
        control.send(&Event::Died { vcpu: 1, reason: "a\nb".into() }).unwrap();
        control.send(&Event::ManagerLost).unwrap();
        let mut bytes = [0; 200];
        let read = starter.read(&mut bytes).unwrap();
        let text = std::str::from_utf8(&bytes[..read]).unwrap();
        assert_eq!(
            text,
            "{\"event\":\"died\",\"vcpu\":1,\"reason\":\"a\\nb\"}\n{\"event\":\"manager_lost\"}\n"
        );
        drop(starter);
        control.send(&Event::ManagerLost).unwrap();
    }
}
