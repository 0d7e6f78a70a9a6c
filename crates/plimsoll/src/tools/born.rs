//! Machines of our own VMM, which say where their memory is and what is in their registers, by their inspection socket
//! (`inspect` in a machine's configuration).
//!
//! Enters: the socket. Leaves: the machine as those that were found from outside are, but that what is absent of its memory may be with its
//! pager: reading it has it brought back. What must never happen: another process read than the one that listens.
use super::said;
use plimsoll_attach::qmp::{Registers, Segment};
use plimsoll_attach::vmm::Vmm;
use plimsoll_attach::{Dossier, RamBacking, RamRange};
use plimsoll_inspect::Census;
use plimsoll_sys::HvaRange;
use plimsoll_sys::pagemap::Pagemap;
use plimsoll_types::{ByteCount, Gpa, Hva};
use plimsoll_vmm::control::{self, Command, Event, Ram};
use rustix::net::sockopt::socket_peercred;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A machine answers at once; its vCPUs have a second.
const PATIENCE: Duration = Duration::from_secs(60);
const BETWEEN: Duration = Duration::from_millis(100);
/// What a machine says that it cannot do now, and may be able to a moment later: its host was busy, or somebody else asks.
const PASSING: [&str; 2] = ["did not leave KVM", "is being asked"];
/// The longest line: a machine has few regions, a vCPU a few dozen registers.
const LINE_MAX: u64 = 1 << 16;

/// A machine that was born under plimsoll.
pub(super) struct Born {
    socket: BufReader<UnixStream>,
    pub(super) name: String,
    pub(super) process: u32,
    vcpus: u32,
    ram: Vec<Ram>,
}

impl Born {
    /// Hears who listens there. Whoever is served before is waited for.
    pub(super) fn connect(path: &Path) -> Result<Self, String> {
        let failed = |error: std::io::Error| format!("the inspection socket {}: {error}", path.display());
        let socket = UnixStream::connect(path).map_err(failed)?;
        socket.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        socket.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
        let peer = socket_peercred(&socket).map_err(|error| failed(error.into()))?;
        let mut socket = BufReader::new(socket);
        let Event::Started { name, pid, vcpus, ram, .. } = event(&mut socket)? else {
            return Err(format!("{} is no machine's inspection socket", path.display()));
        };
        // In another namespace it knows itself by another number; what counts is who listens.
        let process = u32::try_from(peer.pid.as_raw_nonzero().get()).unwrap_or(pid);
        Ok(Self { socket, name, process, vcpus, ram })
    }

    /// Whether an operator means this one.
    pub(super) fn is_called(&self, machine: &str) -> bool {
        machine == self.name || machine == self.process.to_string()
    }

    /// Fills in what nobody else knows of it, if that is a machine of ours. Says where its RAM is in the guest.
    pub(super) fn describe(
        &self,
        dossier: &mut Dossier,
        pagemap: &Pagemap,
    ) -> Result<Vec<(Gpa, HvaRange)>, String> {
        if dossier.vmm != Vmm::Plimsoll {
            return Err(format!("{} was not born under plimsoll", dossier.name));
        }
        let mut pieces = Vec::new();
        for ram in &self.ram {
            let hva = HvaRange::new(Hva(ram.hva), ByteCount(ram.bytes))
                .ok_or_else(|| format!("{} has {} bytes at {:#x}?", self.name, ram.bytes, ram.hva))?;
            let census = Census::take(pagemap, hva).map_err(said)?;
            dossier.ram.push(RamRange {
                hva,
                block: "ram".to_owned(),
                backing: RamBacking::Paged,
                node: None,
                resident: census.present,
                swapped: census.swapped,
                hazards: Vec::new(),
            });
            pieces.push((Gpa(ram.gpa), hva));
        }
        dossier.name.clone_from(&self.name);
        Ok(pieces)
    }

    /// The numbers of its vCPUs.
    pub(super) fn processors(&self) -> Vec<u32> {
        (0..self.vcpus).collect()
    }

    fn tell(&mut self, command: Command) -> Result<(), String> {
        let mut line = serde_json::to_vec(&command).map_err(said)?;
        line.push(b'\n');
        self.socket.get_mut().write_all(&line).map_err(said)
    }

    /// Has all its vCPUs stand still, until they are released, this ends, or the machine has to go on. A host that is busy may take several
    /// attempts, before each of which `go_on` may end them. Says since when: it ran between the attempts.
    pub(super) fn hold(&mut self, mut go_on: impl FnMut() -> Result<(), String>) -> Result<Instant, String> {
        let first = Instant::now();
        loop {
            go_on()?;
            let since = Instant::now();
            let Some(message) = self.refusal(Command::Hold)? else { return Ok(since) };
            let is_passing = PASSING.iter().any(|passing| message.contains(passing));
            if !is_passing || first.elapsed() > PATIENCE / 2 {
                return Err(format!("{} does not stand still: {message}", self.name));
            }
            std::thread::sleep(BETWEEN);
        }
    }

    /// Lets it go on. Says why, if it did not stand still to the end.
    pub(super) fn release(&mut self) -> Result<Option<String>, String> {
        // An error that waits here since then says why it went on. Otherwise the answer is one, where nothing was held any more.
        self.refusal(Command::Release)
    }

    /// Tells it to hold or to release its vCPUs, and hears that it did, or else why not.
    fn refusal(&mut self, command: Command) -> Result<Option<String>, String> {
        self.tell(command)?;
        loop {
            match event(&mut self.socket)? {
                Event::Held if command == Command::Hold => return Ok(None),
                Event::Released if command == Command::Release => return Ok(None),
                Event::Error { message } => return Ok(Some(message)),
                _ => {}
            }
        }
    }

    /// What a vCPU has in its registers.
    pub(super) fn registers(&mut self, vcpu: u32) -> Result<Registers, String> {
        self.tell(Command::Registers { vcpu })?;
        loop {
            match event(&mut self.socket)? {
                Event::Registers { vcpu: answered, registers: Some(registers), .. } if answered == vcpu => {
                    return Ok(as_a_monitor_says(&registers));
                }
                Event::Registers { vcpu: answered, refused, .. } if answered == vcpu => {
                    let why = refused.unwrap_or_else(|| "it does not say why".to_owned());
                    return Err(format!(
                        "{} does not say the registers of processor {vcpu}: {why}",
                        self.name
                    ));
                }
                Event::Error { message } => return Err(format!("{}: {message}", self.name)),
                _ => {}
            }
        }
    }
}

fn event(socket: &mut BufReader<UnixStream>) -> Result<Event, String> {
    let mut line = Vec::new();
    let read = socket.take(LINE_MAX).read_until(b'\n', &mut line);
    let read = read.map_err(|error| format!("the machine does not answer: {error}"))?;
    if read == 0 {
        return Err("the machine has closed its inspection socket".to_owned());
    }
    serde_json::from_slice(&line).map_err(|error| format!("the machine says what makes no sense: {error}"))
}

fn as_a_monitor_says(registers: &control::Registers) -> Registers {
    let segment = |segment: control::Segment| Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        flags: segment.flags,
    };
    Registers {
        general: registers.general,
        rip: registers.rip,
        rflags: registers.rflags,
        segments: registers.segments.map(segment),
        tables: registers.tables,
        control: registers.control,
        efer: registers.efer,
        privilege: registers.privilege,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_vmm::Accel;
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    /// A machine that is only a socket. It answers each command with the next of these, and ends with the last. Leaves: what it was told.
    fn machine(answers: Vec<Vec<Event>>) -> (Born, JoinHandle<Vec<Command>>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("inspect");
        let listener = UnixListener::bind(&path).unwrap();
        let told = std::thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            let started = Event::Started {
                name: "fake".to_owned(),
                pid: 1,
                accel: Accel::InProcess { because: String::new() },
                machine: None,
                vcpus: 2,
                tsc_hz: 0,
                ram: Vec::new(),
            };
            say(&socket, &started);
            let mut told: Vec<Command> = Vec::new();
            for (events, line) in answers.iter().zip(BufReader::new(&socket).lines()) {
                told.push(serde_json::from_str(&line.unwrap()).unwrap());
                events.iter().for_each(|event| say(&socket, event));
            }
            told
        });
        (Born::connect(&path).unwrap(), told)
    }

    fn say(mut socket: &UnixStream, event: &Event) {
        writeln!(socket, "{}", serde_json::to_string(event).unwrap()).unwrap();
    }

    fn error(message: &str) -> Event {
        Event::Error { message: message.to_owned() }
    }

    #[test]
    fn a_hold_is_tried_again_where_a_moment_may_help_and_counts_from_the_attempt_that_did() {
        let busy = || vec![error("the vCPUs did not leave KVM within 1 s")];
        let (mut born, told) = machine(vec![busy(), vec![Event::Held]]);
        let before = Instant::now();
        let since = born.hold(|| Ok(())).unwrap();
        assert!(since.duration_since(before) >= BETWEEN);
        assert_eq!(told.join().unwrap(), [Command::Hold; 2]);

        let (mut born, told) = machine(vec![vec![error("it cannot be held")], vec![Event::Held]]);
        assert_eq!(born.hold(|| Ok(())), Err("fake does not stand still: it cannot be held".to_owned()));
        drop(born);
        assert_eq!(told.join().unwrap(), [Command::Hold]);

        let (mut born, told) = machine(vec![busy(), vec![Event::Held]]);
        let mut attempts = 0;
        let go_on = || {
            attempts += 1;
            if attempts == 1 { Ok(()) } else { Err("enough".to_owned()) }
        };
        assert_eq!(born.hold(go_on), Err("enough".to_owned()));
        drop(born);
        assert_eq!(told.join().unwrap(), [Command::Hold]);
    }

    #[test]
    fn one_that_went_on_by_itself_is_noticed_when_it_is_released() {
        let (mut born, told) = machine(vec![vec![Event::Held], vec![Event::Released]]);
        born.hold(|| Ok(())).unwrap();
        assert_eq!(born.release(), Ok(None));
        assert_eq!(told.join().unwrap(), [Command::Hold, Command::Release]);

        let late = || vec![error("nobody holds the machine")];
        let (mut born, told) = machine(vec![vec![Event::Held], late()]);
        born.hold(|| Ok(())).unwrap();
        assert_eq!(born.release(), Ok(Some("nobody holds the machine".to_owned())));
        told.join().unwrap();

        // It has said so before, and that says why.
        let (mut born, told) = machine(vec![vec![Event::Held, error("two minutes are over")], late()]);
        born.hold(|| Ok(())).unwrap();
        assert_eq!(born.release(), Ok(Some("two minutes are over".to_owned())));
        told.join().unwrap();
    }
}
