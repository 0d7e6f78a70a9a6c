//! A KVM guest in a process of its own, which is this program in another role.
//!
//! Enters: a configuration. Leaves: a guest that does what it is asked and says how long it took by its own clock. What
//! must never happen: a process that outlives the benchmark; so whoever drops a [`Guest`] ends it, and it dies with the
//! thread that started it.
use crate::contents::{POOL_PAGES, SEED};
use crate::figures::float;
use crate::report::Sample;
use crate::session::{BenchError, Interrupt, process_cpu_seconds};
use anyhow::{Context, Result, anyhow};
use plimsoll_guest::content::Mix;
use plimsoll_guest::probe::ProbeCommand;
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_linux::cgroup::MemoryCgroup;
use plimsoll_sys::fdpass::seqpacket_pair;
use plimsoll_sys::pagemap::{Entry, Pagemap};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::process::{adopt_inherited, make_inheritable};
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE};
use plimsoll_vmm::config::{AccelChoice, Hole, HugePages, Management, Workload};
use plimsoll_vmm::control::{BalloonPiece, Command, Event, FrameOrder, Ram, StopMode};
use plimsoll_vmm::report::{ProbeReport, Summary};
use plimsoll_vmm::{Accel, VmmConfig};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ExitCode};
use std::time::{Duration, Instant};

/// The first argument of a process that is to be a guest.
const ROLE: &str = "be-a-guest";
/// Longer than any step takes: what is not there by then never comes.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a wait looks for signals.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A guest's memory; the lowest 6 MiB are hardly touched.
pub(crate) const RAM: ByteCount = ByteCount::mib(134);
/// How long a guest works before it counts, and how long it counts: two sampling periods.
const WARM_NS: u64 = 500_000_000;
const WORK_NS: u64 = 4_000_000_000;

/// Whether guests can be run here.
pub(crate) fn check_kvm() -> Result<(), BenchError> {
    match plimsoll_vmm::probe() {
        accel @ Accel::InProcess { .. } => Err(BenchError::NotHere(format!("guests need KVM: {accel}"))),
        _ => Ok(()),
    }
}

/// A guest of this kind with these contents and nothing written yet.
pub(crate) fn config(kind: WorkloadKind, mix: Mix) -> VmmConfig {
    let spec = WorkloadSpec { seed: SEED, ..WorkloadSpec::new(kind) };
    let workload = Workload { spec, mix, seed: SEED, pool_seed: SEED, pool_pages: POOL_PAGES };
    VmmConfig {
        hole: Hole::None,
        accel: AccelChoice::Kvm,
        huge_pages: HugePages::Never,
        report_ms: 100,
        ..VmmConfig::new("bench", RAM.0, workload)
    }
}

/// One that works on all its pages, the hot ones most, and compares each with what it must be.
pub(crate) fn busy(mix: Mix) -> VmmConfig {
    let mut config = VmmConfig { huge_pages: HugePages::Advise, ..config(WorkloadKind::Zipf, mix) };
    config.workload.spec.final_check = 1;
    config
}

/// Becomes a guest, if that is what this process was started for. Its control socket is the standard input.
pub(crate) fn role() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some(ROLE) {
        return None;
    }
    Some(match become_guest(arguments.next(), arguments.next()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn become_guest(config: Option<String>, handover: Option<String>) -> Result<()> {
    let config: VmmConfig = serde_json::from_str(&config.context("no configuration")?)?;
    let handover = handover.context("no hand-over socket")?.parse()?;
    let control = std::io::stdin().as_fd().try_clone_to_owned()?;
    let report = plimsoll_vmm::run(&config, Some(adopt_inherited(handover)?.into()), control)?;
    if report.abandoned > 0 {
        // Threads still wait in the kernel for pages; only the end of the process frees them.
        std::process::exit(3);
    }
    report.died.map_or(Ok(()), |died| Err(anyhow!(died)))
}

/// A guest and its process.
pub(crate) struct Guest {
    child: Child,
    control: BufReader<UnixStream>,
    /// What has come of a line.
    line: Vec<u8>,
    interrupt: Interrupt,
    process: Pidfd,
    ram: Vec<Ram>,
}

impl Guest {
    /// Starts its process, and returns the manager's end of its hand-over socket. Follow with
    /// [`until_started`](Self::until_started).
    pub(crate) fn launch(config: &VmmConfig, interrupt: &Interrupt) -> Result<(Self, OwnedFd), BenchError> {
        interrupt.check()?;
        let own = std::env::current_exe().context("cannot find this program")?;
        Ok(Self::try_launch(&own, &[], config, interrupt).context("cannot start a guest")?)
    }

    /// One that no manager serves, once its vCPUs run.
    pub(crate) fn unmanaged(config: VmmConfig, interrupt: &Interrupt) -> Result<Self, BenchError> {
        let own = std::env::current_exe().context("cannot find this program")?;
        Self::unmanaged_as(&own, &[], config, interrupt)
    }

    /// The same, in a memory cgroup from its first page on.
    pub(crate) fn unmanaged_in(
        cgroup: &MemoryCgroup,
        config: VmmConfig,
        interrupt: &Interrupt,
    ) -> Result<Self, BenchError> {
        let config = VmmConfig { management: Management::Unmanaged, ..config };
        let (mut guest, _) = Self::launch(&config, interrupt)?;
        cgroup.enter(guest.process().process()).context("cannot put a guest into its cgroup")?;
        guest.until_started()?;
        Ok(guest)
    }

    /// One that no manager serves, its process being started from that file, which is this program, with more arguments.
    pub(crate) fn unmanaged_as(
        program: &Path,
        arguments: &[&str],
        config: VmmConfig,
        interrupt: &Interrupt,
    ) -> Result<Self, BenchError> {
        interrupt.check()?;
        let config = VmmConfig { management: Management::Unmanaged, ..config };
        let launched = Self::try_launch(program, arguments, &config, interrupt);
        let (mut guest, _) = launched.context("cannot start a guest")?;
        guest.until_started()?;
        Ok(guest)
    }

    fn try_launch(
        program: &Path,
        arguments: &[&str],
        config: &VmmConfig,
        interrupt: &Interrupt,
    ) -> Result<(Self, OwnedFd)> {
        let (control, theirs) = UnixStream::pair()?;
        let (socket, handover) = seqpacket_pair()?;
        make_inheritable(&handover)?;
        control.set_read_timeout(Some(LOOK_EVERY))?;
        let mut command = std::process::Command::new(program);
        command.args([ROLE, &serde_json::to_string(config)?, &handover.as_raw_fd().to_string()]);
        command.args(arguments);
        // Signals of the terminal are for this process, which ends the guests itself.
        let mut child = command.process_group(0).stdin(OwnedFd::from(theirs)).spawn()?;
        let process = Pidfd::from_child(&mut child);
        let process = process.inspect_err(|_| {
            let _ = child.kill();
        })?;
        let (control, line) = (BufReader::new(control), Vec::new());
        let interrupt = interrupt.clone();
        Ok((Self { child, control, line, interrupt, process, ram: Vec::new() }, socket))
    }

    /// Waits until its vCPUs run.
    pub(crate) fn until_started(&mut self) -> Result<(), BenchError> {
        self.ram = self.until("to start", |event| match event {
            Event::Started { ram, .. } => Some(ram),
            _ => None,
        })?;
        Ok(())
    }

    /// Events up to the first that `wanted` accepts.
    fn until<T>(&mut self, what: &str, mut wanted: impl FnMut(Event) -> Option<T>) -> Result<T, BenchError> {
        let start = Instant::now();
        loop {
            match self.event()? {
                Some(Event::Died { reason, .. }) => return Err(anyhow!("a guest died: {reason}").into()),
                Some(Event::Error { message }) => return Err(anyhow!("a guest refused: {message}").into()),
                Some(event) => {
                    if let Some(found) = wanted(event) {
                        return Ok(found);
                    }
                }
                None if start.elapsed() > PATIENCE => {
                    return Err(anyhow!("waited {} s in vain for a guest {what}", PATIENCE.as_secs()).into());
                }
                None => {}
            }
        }
    }

    /// The next event, if one comes soon.
    fn event(&mut self) -> Result<Option<Event>, BenchError> {
        self.interrupt.check()?;
        match self.control.read_until(b'\n', &mut self.line) {
            Ok(0) => return Err(anyhow!("a guest ended").into()),
            Ok(_) if self.line.ends_with(b"\n") => {}
            Ok(_) => return Ok(None),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(error) => return Err(anyhow!(error).context("cannot hear a guest").into()),
        }
        let event = serde_json::from_slice(&self.line).context("a guest said something unexpected")?;
        self.line.clear();
        Ok(Some(event))
    }

    /// The next event, if one has come.
    pub(crate) fn heard(&mut self) -> Result<Option<Event>, BenchError> {
        let mut ready = [PollFd::new(self.control.get_ref(), PollFlags::IN)];
        let is_ready = !self.control.buffer().is_empty()
            || poll(&mut ready, Some(&Timespec::default())).context("cannot hear a guest")? > 0;
        if is_ready { self.event() } else { Ok(None) }
    }

    /// Tells it something, without waiting for what it says.
    pub(crate) fn tell(&self, command: &Command) -> Result<()> {
        let line = serde_json::to_string(command)? + "\n";
        self.control.get_ref().write_all(line.as_bytes()).context("cannot tell a guest")
    }

    /// Has it do something, without waiting for the answer.
    pub(crate) fn ask(&self, probe: ProbeCommand) -> Result<()> {
        self.tell(&Command::Probe { vcpu: 0, probe })
    }

    /// Waits for the answer to what it was asked first.
    pub(crate) fn answer(&mut self) -> Result<ProbeReport, BenchError> {
        let report = self.until("to answer", |event| match event {
            Event::Probed(report) => Some(report),
            _ => None,
        })?;
        check_words(report.wrong_words)?;
        Ok(report)
    }

    /// Has it do something, and waits until it is done.
    pub(crate) fn probe(&mut self, probe: ProbeCommand) -> Result<ProbeReport, BenchError> {
        self.ask(probe)?;
        self.answer()
    }

    /// Sets its balloon's target, and waits until it has that. Returns how long it took from the command's arrival on.
    pub(crate) fn balloon(&mut self, bytes: u64, piece: BalloonPiece) -> Result<Duration, BenchError> {
        self.tell(&Command::Balloon { target_bytes: bytes, piece })?;
        let (has, ns) = self.until("to settle its balloon", |event| match event {
            Event::Ballooned { ballooned_bytes, ns, .. } => Some((ballooned_bytes, ns)),
            _ => None,
        })?;
        if has != bytes {
            return Err(anyhow!("a guest's balloon has {has} bytes and should have {bytes}").into());
        }
        Ok(Duration::from_nanos(ns))
    }

    /// Takes frames of it or gives some back, all that was asked. Returns how long it took from the command's arrival on.
    pub(crate) fn frames(&mut self, order: FrameOrder) -> Result<Duration, BenchError> {
        self.tell(&Command::Frames(order))?;
        let (done, ns, refused) = self.until("to give frames", |event| match event {
            Event::Frames { done_bytes, ns, refused, .. } => Some((done_bytes, ns, refused)),
            _ => None,
        })?;
        if done != order.bytes || refused.is_some() {
            return Err(anyhow!("of {order:?} {done} bytes were done: {refused:?}").into());
        }
        Ok(Duration::from_nanos(ns))
    }

    /// Begins a window, which ends what the guest does for as long as one lasts.
    pub(crate) fn window(&self, number: u64) -> Result<()> {
        self.tell(&Command::Window { number })
    }

    /// How many pages it touched in that window, which has ended.
    pub(crate) fn window_pages(&mut self, number: u64) -> Result<u64, BenchError> {
        self.until("to end a window", |event| match event {
            Event::Report(Summary { window: Some(window), .. }) if window.number == number => {
                Some(window.pages)
            }
            _ => None,
        })
    }

    /// Operations a second, by its own clock; then it ends.
    pub(crate) fn operations(&mut self) -> Result<Sample, BenchError> {
        let sample = self.operations_for(WARM_NS, WORK_NS, || Ok(()))?;
        self.finish()?;
        Ok(sample)
    }

    /// Operations a second for so long, by its own clock, once it has worked for so long; with what is done at the beginning.
    pub(crate) fn operations_for(
        &mut self,
        warm_ns: u64,
        work_ns: u64,
        begin: impl FnOnce() -> Result<()>,
    ) -> Result<Sample, BenchError> {
        let from = self.until_worked(warm_ns)?;
        let cpu = self.cpu_seconds()?;
        begin()?;
        let to = self.until_worked(from.running_ns + work_ns)?;
        let cpu = self.cpu_seconds()? - cpu;
        let seconds = float(to.running_ns - from.running_ns) / 1e9;
        Ok(Sample { value: float(to.operations - from.operations) / seconds, cpu_seconds: Some(cpu) })
    }

    /// Its first report after it has worked for so long.
    pub(crate) fn until_worked(&mut self, running_ns: u64) -> Result<Summary, BenchError> {
        self.until("to work", |event| match event {
            Event::Report(summary) if summary.running_ns >= running_ns => Some(summary),
            _ => None,
        })
    }

    /// Has it read every page once more and end.
    pub(crate) fn finish(&mut self) -> Result<(), BenchError> {
        self.tell(&Command::Stop { mode: StopMode::Finish })?;
        let last = self.until("to end", |event| match event {
            Event::Done(summary) => Some(summary),
            _ => None,
        })?;
        check_words(last.wrong_words)?;
        let Summary { checked_pages, footprint_pages, .. } = last;
        if checked_pages < footprint_pages {
            return Err(anyhow!("a guest checked {checked_pages} of {footprint_pages} pages").into());
        }
        Ok(())
    }

    /// Its process.
    pub(crate) fn process(&self) -> &Pidfd {
        &self.process
    }

    /// Where its memory is.
    pub(crate) fn ram(&self) -> Vec<HvaRange> {
        self.ram.iter().filter_map(|ram| HvaRange::new(Hva(ram.hva), ByteCount(ram.bytes))).collect()
    }

    /// The host's address of a guest's.
    pub(crate) fn hva(&self, gpa: u64) -> Option<Hva> {
        let ram = self.ram.iter().find(|ram| gpa >= ram.gpa && gpa - ram.gpa < ram.bytes)?;
        Some(Hva(ram.hva + (gpa - ram.gpa)))
    }

    /// What the page map says of each page of its memory.
    pub(crate) fn entries(&self) -> Result<Vec<Entry>> {
        let pagemap = Pagemap::open(self.process.process())?;
        let (mut all, mut region) = (Vec::new(), Vec::new());
        for range in self.ram() {
            pagemap.read(range, &mut region)?;
            all.append(&mut region);
        }
        Ok(all)
    }

    /// How many of its pages are in memory.
    pub(crate) fn present(&self) -> Result<usize> {
        Ok(self.entries()?.iter().filter(|entry| entry.contains(Entry::PRESENT)).count())
    }

    /// User and system time so far, of this process and of the guest's.
    pub(crate) fn cpu_seconds(&self) -> Result<f64> {
        Ok(process_cpu_seconds() + cpu_seconds_of(self.process.process())?)
    }
}

fn check_words(wrong: u64) -> Result<()> {
    match wrong {
        0 => Ok(()),
        wrong => Err(anyhow!("a guest found {wrong} wrong words: the numbers mean nothing")),
    }
}

/// User and system time of another process so far, of the threads it has now.
fn cpu_seconds_of(process: ProcessId) -> Result<f64> {
    let folder = format!("/proc/{}/task", process.get());
    let mut ns = 0;
    for thread in fs::read_dir(&folder).with_context(|| format!("cannot list {folder}"))? {
        let path = thread?.path().join("schedstat");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let first = text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok());
        ns += first.with_context(|| format!("{} has no time in it", path.display()))?;
    }
    Ok(Duration::from_nanos(ns).as_secs_f64())
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How many pages a range has.
pub(crate) const fn pages_in(range: HvaRange) -> u64 {
    range.len().0 / PAGE_SIZE as u64
}
