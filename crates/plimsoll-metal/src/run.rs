//! One QEMU with one hypervisor in it.
use crate::wire::{
    Device, Execute, Given, GuestLine, GuestSettings, Header, Line, MAGIC, Paging, ProgramKind, Provoke,
};
use crate::{Digest, IMAGE};
use plimsoll_guest::abi::{ABI_VERSION, MAX_REGIONS, PARAMS_MAGIC, Params, Region};
use plimsoll_guest::content::Mix;
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_sys::pidfd::Signal;
use plimsoll_sys::process::end_with_parent;
use plimsoll_types::ByteCount;
use std::io::{self, BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use thiserror::Error;
use zerocopy::IntoBytes;

const PROGRAM: &str = "qemu-system-x86_64";
const IMAGE_FILE: &str = "image";
/// Where the hypervisor's exit statuses begin, see `image/src/console.rs`: `number << 1 | 1`.
const DONE: i32 = 0x21;
const REFUSED: i32 = 0x23;

/// A hypervisor cannot be run, or has stopped speaking.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MetalError {
    /// QEMU cannot be started.
    #[error("{PROGRAM} could not be started; is qemu-system-x86 installed? (`cargo xtask setup` brings it)")]
    Start(#[source] io::Error),
    /// Its files cannot be made.
    #[error("the files for {PROGRAM} could not be made")]
    Files(#[source] io::Error),
    /// A name does not fit.
    #[error("the guest's name {name:?} has more than 32 bytes; use a shorter one")]
    Name {
        /// The name.
        name: String,
    },
    /// Nothing was said for too long.
    #[error("the hypervisor said nothing for {} s", .waited.as_secs())]
    Silent {
        /// How long was waited.
        waited: Duration,
    },
    /// It ended otherwise than it should.
    #[error("the hypervisor did not end well ({end:?}); {complaints}")]
    Ended {
        /// How.
        end: Event,
        /// What QEMU complained about.
        complaints: String,
    },
}

/// A guest: what it is called, runs and is told.
#[derive(Clone, Debug)]
pub struct Guest {
    /// At most 32 bytes.
    pub name: String,
    /// Its program.
    pub program: ProgramKind,
    /// How its addresses become the machine's.
    pub paging: Paging,
    /// Pages that it may execute beside those of its program; `None` if it may execute whatever it likes.
    pub code: Option<Vec<Digest>>,
    /// The device that it owns, behind remapping hardware ([`Board::Remapping`]).
    pub device: Device,
    /// Its parameter page; `tsc_hz` is filled in by the hypervisor.
    pub params: Params,
}

impl Guest {
    /// One that works in one region of so many bytes, with contents as guests have them by default.
    pub fn new(name: impl Into<String>, size: ByteCount, seed: u64, workload: WorkloadSpec) -> Self {
        let mut regions = [Region::default(); MAX_REGIONS];
        regions[0] = Region { gpa: 0, len: size.0 };
        let params = Params {
            magic: PARAMS_MAGIC,
            version: ABI_VERSION,
            vcpus: 1,
            tsc_hz: 0,
            seed,
            pool_seed: 1,
            pool_pages: 512,
            region_count: 1,
            reserved: 0,
            regions,
            mix: Mix::default(),
            workload,
        };
        Self {
            name: name.into(),
            program: ProgramKind::WORKLOAD,
            paging: Paging::NESTED,
            code: None,
            device: Device::NONE,
            params,
        }
    }
}

/// What the machine's time-stamp counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ticks {
    /// Time, as the emulated machine sees it.
    Time,
    /// Instructions, 8 ns each: QEMU's `-icount`, which counts them exactly. Time then passes as they are executed.
    Instructions,
}

/// Which machine is emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Board {
    /// QEMU's `pc`: nothing contains its devices, so that no guest owns one.
    Plain,
    /// QEMU's `q35` with Intel's remapping hardware, for guests that own devices. Which devices there are, [`Options::arguments`] say.
    Remapping,
}

impl Board {
    /// Nothing of it may be merged: it is in nobody's sharing domain, and would keep the host's machines from sharing.
    const fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Plain => &["-machine", "pc,mem-merge=off"],
            // Four levels of tables. It must come before the devices that are behind it.
            Self::Remapping => &["-machine", "q35,mem-merge=off", "-device", "intel-iommu,aw-bits=48"],
        }
    }
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The machine's memory, whole MiB: the hard line.
    pub memory: ByteCount,
    /// Which machine it is.
    pub board: Board,
    /// QEMU's processor.
    pub processor: &'static str,
    /// What its time is.
    pub ticks: Ticks,
    /// How long the guests work: less, if there are guests whose program ends by itself and these have ended.
    pub seconds: u32,
    /// What the hypervisor is to do to itself.
    pub provoke: Provoke,
    /// The guests.
    pub guests: Vec<Guest>,
    /// What is decided by: nothing, or settings and the views that are decided about before guests run. Once they run, what is measured
    /// is decided about every second. Guests are numbered from 1 on.
    pub policy: Vec<Given>,
    /// Further arguments of QEMU's, such as `-s -S` for a debugger.
    pub arguments: Vec<String>,
}

impl Options {
    /// A machine with so much memory and no guests.
    pub fn new(memory: ByteCount) -> Self {
        Self {
            memory,
            board: Board::Plain,
            processor: "max,+svm",
            ticks: Ticks::Time,
            seconds: 1,
            provoke: Provoke::Nothing,
            guests: Vec::new(),
            policy: Vec::new(),
            arguments: Vec::new(),
        }
    }

    /// A machine without guests that decides about what others saw, with memory enough for that.
    ///
    /// # Errors
    /// [`MetalError::Files`]: it cannot be written down, which is a bug.
    pub fn of_decisions(policy: Vec<Given>) -> Result<Self, MetalError> {
        let options = Self { policy, ..Self::new(ByteCount::mib(0)) };
        // As a module, as the hypervisor's copy, and what its heap has for it.
        let bytes = options.policy_lines()?.len() as u64 * 4;
        let memory = ByteCount(ByteCount::mib(32).0 + bytes.next_multiple_of(ByteCount::mib(1).0));
        Ok(Self { memory, ..options })
    }

    /// One kernel that does little but change its address spaces, with each kind of paging, in a machine that counts instructions and
    /// has memory enough: [`GuestLine::exits_per_million`] then says what each costs. They are called nested, shadow and direct, and have
    /// the same results.
    pub fn of_modes() -> Self {
        // By its seed the program knows what it is to be; the third asks for its entries, and is the same otherwise.
        let kernels =
            [("nested", Paging::NESTED, 4), ("shadow", Paging::SHADOW, 4), ("direct", Paging::DIRECT, 5)];
        let guests = kernels.map(|(name, paging, seed)| {
            let idle = WorkloadSpec::new(WorkloadKind::Idle);
            Guest { program: ProgramKind::KERNEL, paging, ..Guest::new(name, ByteCount::mib(16), seed, idle) }
        });
        Self { ticks: Ticks::Instructions, guests: guests.into(), ..Self::new(ByteCount::mib(48)) }
    }

    fn policy_lines(&self) -> Result<Vec<u8>, MetalError> {
        let mut lines = Vec::new();
        for given in &self.policy {
            serde_json::to_writer(&mut lines, given).map_err(|error| MetalError::Files(error.into()))?;
            lines.push(b'\n');
        }
        Ok(lines)
    }

    /// The boot module.
    fn module(&self) -> Result<Vec<u8>, MetalError> {
        let policy = self.policy_lines()?;
        let header = Header {
            magic: MAGIC,
            guests: u32::try_from(self.guests.len()).unwrap_or(u32::MAX),
            seconds: self.seconds,
            provoke: self.provoke as u32,
            policy: u32::try_from(policy.len()).unwrap_or(u32::MAX),
        };
        let mut module = header.as_bytes().to_vec();
        for Guest { name: text, program, paging, code, device, params } in &self.guests {
            let mut name = [0; 32];
            let place = name.get_mut(..text.len()).ok_or(MetalError::Name { name: text.clone() })?;
            place.copy_from_slice(text.as_bytes());
            let settings = GuestSettings {
                name,
                program: *program,
                paging: *paging,
                execute: if code.is_some() { Execute::KNOWN } else { Execute::ANYTHING },
                digests: code.as_ref().map_or(0, Vec::len) as u64,
                device: *device,
                params: *params,
            };
            module.extend_from_slice(settings.as_bytes());
        }
        let digests = self.guests.iter().filter_map(|guest| guest.code.as_ref()).flatten();
        module.extend(digests.flat_map(|digest| digest.0));
        module.extend(policy);
        Ok(module)
    }
}

/// Something the hypervisor said or did.
#[derive(Clone, Debug)]
pub enum Event {
    /// A line for people.
    Said(String),
    /// A line of the report.
    Report(Box<Line>),
    /// All was done.
    Done,
    /// It could not be done; the last line said why.
    Refused,
    /// It crashed, or QEMU did.
    Crashed(ExitStatus),
}

/// A running hypervisor.
#[derive(Debug)]
pub struct Run {
    child: Child,
    lines: Receiver<String>,
    reader: Option<JoinHandle<()>>,
    /// What QEMU itself complains about.
    complaints: Option<JoinHandle<String>>,
    /// The image and the settings.
    files: TempDir,
}

impl Run {
    /// Starts it.
    ///
    /// # Errors
    /// [`MetalError`]; nothing is left behind.
    pub fn start(options: &Options) -> Result<Self, MetalError> {
        let files =
            tempfile::Builder::new().prefix("plimsoll-metal-").tempdir().map_err(MetalError::Files)?;
        let (image, module) = (files.path().join(IMAGE_FILE), files.path().join("settings"));
        std::fs::write(&image, IMAGE).map_err(MetalError::Files)?;
        std::fs::write(&module, options.module()?).map_err(MetalError::Files)?;
        let mut command = Command::new(PROGRAM);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-serial",
            "stdio",
        ]);
        command.args(["-accel", "tcg", "-cpu", options.processor]).args(options.board.arguments());
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        if options.ticks == Ticks::Instructions {
            command.args(["-icount", "shift=3"]);
        }
        command.arg("-m").arg(format!("{}M", options.memory.0 >> 20));
        command.arg("-kernel").arg(image).arg("-initrd").arg(module).args(&options.arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        end_with_parent(&mut command, Signal::KILL);
        let mut child = command.spawn().map_err(MetalError::Start)?;
        let (sender, lines) = channel();
        let reader = child.stdout.take().map(|stdout| {
            std::thread::spawn(move || {
                // A line that is not UTF-8 is as good as none.
                let lines = BufReader::new(stdout).split(b'\n').map_while(Result::ok);
                let text = |line: Vec<u8>| String::from_utf8_lossy(&line).trim_end().to_owned();
                // Nobody listens any more: nothing is to be read either.
                let _ = lines.map(text).try_for_each(|line| sender.send(line));
            })
        });
        let complaints = child.stderr.take().map(|mut stderr| {
            std::thread::spawn(move || {
                let mut text = String::new();
                // What could be read of it is what there is to say.
                let _ = stderr.read_to_string(&mut text);
                text
            })
        });
        Ok(Self { child, lines, reader, complaints, files })
    }

    /// What comes next, if it comes within that time. After the end of the machine there is nothing more.
    ///
    /// # Errors
    /// [`MetalError::Silent`]; it may be asked again.
    pub fn next(&mut self, within: Duration) -> Result<Event, MetalError> {
        match self.lines.recv_timeout(within) {
            Ok(line) if line.starts_with('{') => {
                Ok(serde_json::from_str(&line)
                    .map_or(Event::Said(line), |line| Event::Report(Box::new(line))))
            }
            Ok(line) => Ok(Event::Said(line)),
            Err(RecvTimeoutError::Timeout) => Err(MetalError::Silent { waited: within }),
            Err(RecvTimeoutError::Disconnected) => self.ended(within),
        }
    }

    /// Shows what comes until the end, which must be a good one. Nothing may be said for `within` at most.
    ///
    /// # Errors
    /// [`MetalError::Silent`], [`MetalError::Ended`].
    pub fn finish(mut self, within: Duration, mut show: impl FnMut(Event)) -> Result<(), MetalError> {
        loop {
            match self.next(within)? {
                Event::Done => return Ok(()),
                end @ (Event::Refused | Event::Crashed(_)) => {
                    return Err(MetalError::Ended { end, complaints: self.complaints() });
                }
                event => show(event),
            }
        }
    }

    /// The image, with its symbols, as long as this lives.
    pub fn image(&self) -> PathBuf {
        self.files.path().join(IMAGE_FILE)
    }

    /// What QEMU complained about. Ends it.
    pub fn complaints(&mut self) -> String {
        let _ = self.child.kill();
        let text = self.complaints.take().and_then(|complaints| complaints.join().ok());
        text.unwrap_or_default().trim().to_owned()
    }

    /// The serial line is closed: QEMU is about to end.
    fn ended(&mut self, within: Duration) -> Result<Event, MetalError> {
        let deadline = Instant::now() + within;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => {
                    return Ok(match status.code() {
                        Some(DONE) => Event::Done,
                        Some(REFUSED) => Event::Refused,
                        _ => Event::Crashed(status),
                    });
                }
                _ if Instant::now() >= deadline => return Err(MetalError::Silent { waited: within }),
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // It may have ended; whether or not, it is reaped, and its ends of the pipes close.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for reader in [self.reader.take()].into_iter().flatten() {
            let _ = reader.join();
        }
    }
}

/// Ticks of the time-stamp counter to an instruction, where it counts those.
const TICKS_PER_INSTRUCTION: u64 = 8;
/// Of the instructions counted for one entry of a guest, those of the hypervisor: between the two reads of the counter in `svm::enter_guest`, the
/// second included. That they are so many is in the code, and in a test: a guest's instructions do not depend on how often it leaves.
const SWITCH_INSTRUCTIONS: u64 = 38;

impl GuestLine {
    /// Instructions of the guest's own, if the counter counted instructions.
    pub fn instructions(&self) -> u64 {
        (self.ticks / TICKS_PER_INSTRUCTION).saturating_sub(self.exits * SWITCH_INSTRUCTIONS)
    }

    /// World switches for a million of them.
    pub fn exits_per_million(&self) -> u64 {
        self.exits * 1_000_000 / self.instructions().max(1)
    }
}
