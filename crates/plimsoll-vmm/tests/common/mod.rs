//! What the machine tests share: a starter at the other end of the control socket, and a small manager.
#![expect(dead_code, reason = "each test file uses a part of it")]
#![expect(clippy::unwrap_used, reason = "a helper that cannot go on fails its test")]

use plimsoll_guest::content::Mix;
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_linux::uffd::wire::{self, Hello, Item, Op, Ticket, Welcome};
use plimsoll_sys::uffd::{Event as FaultEvent, EventBuffer, Userfaultfd, Wake};
use plimsoll_sys::{HvaRange, ProcessId, fdpass, process_memory};
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE, PageBytes, PageIndex, SlotPage};
use plimsoll_vmm::config::{AccelChoice, Management, Sandbox, VmmConfig, Workload};
use plimsoll_vmm::control::{Command, Event, StopMode};
use plimsoll_vmm::{Accel, ExitReport, VmmError, probe};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Longer than any event of these tests takes; a machine that hangs fails instead of blocking.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// Pages of every kind.
pub(crate) fn mix() -> Mix {
    Mix { zero: 10, duplicate: 20, text: 40, random: 30 }
}

/// A workload with these seeds.
pub(crate) fn workload(spec: WorkloadSpec) -> Workload {
    Workload { spec, mix: mix(), seed: 7, pool_seed: 8, pool_pages: 64 }
}

/// A workload of a kind that ends after `operations` of each vCPU and checks everything at the end.
pub(crate) fn finite(kind: WorkloadKind, operations: u64) -> WorkloadSpec {
    WorkloadSpec {
        operations,
        final_check: 1,
        ops_per_second: if kind == WorkloadKind::Idle { 1000 } else { 0 },
        burst_ops: 500,
        burst_idle_ms: 2,
        ..WorkloadSpec::new(kind)
    }
}

/// An unmanaged machine that lives in a thread of this process.
pub(crate) fn config(spec: WorkloadSpec, accel: AccelChoice) -> VmmConfig {
    VmmConfig {
        accel,
        sandbox: Sandbox::Off,
        management: Management::Unmanaged,
        report_ms: 20,
        ..VmmConfig::new("test", 64 << 20, workload(spec))
    }
}

/// What can run guests here: in-process always, KVM where it works.
pub(crate) fn accels() -> Vec<AccelChoice> {
    match probe() {
        Accel::Kvm { .. } => vec![AccelChoice::Kvm, AccelChoice::InProcess],
        without => {
            println!("SKIPPED: the half of this test that needs KVM: {without}");
            vec![AccelChoice::InProcess]
        }
    }
}

/// A machine in a thread, seen from its starter.
pub(crate) struct Started {
    socket: UnixStream,
    lines: BufReader<UnixStream>,
    thread: JoinHandle<Result<ExitReport, VmmError>>,
}

impl Started {
    /// Starts it.
    pub(crate) fn new(config: VmmConfig, handover: Option<OwnedFd>) -> Self {
        let (socket, other) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let lines = BufReader::new(socket.try_clone().unwrap());
        let thread =
            thread::spawn(move || plimsoll_vmm::run(&config, handover.map(Into::into), other.into()));
        Self { socket, lines, thread }
    }

    /// Sends a command.
    pub(crate) fn command(&mut self, command: Command) {
        let line = serde_json::to_string(&command).unwrap();
        self.socket.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Tells it to stop.
    pub(crate) fn stop(&mut self, mode: StopMode) {
        self.command(Command::Stop { mode });
    }

    /// The next event, `None` at the end.
    pub(crate) fn event(&mut self) -> Option<Event> {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("the machine should say something in time");
        (!line.is_empty()).then(|| serde_json::from_str(&line).expect(&line))
    }

    /// Events up to the first that `wanted` accepts.
    pub(crate) fn until<T>(&mut self, mut wanted: impl FnMut(&Event) -> Option<T>) -> T {
        loop {
            let event = self.event().expect("the machine ended before the event the test waits for");
            if let Some(found) = wanted(&event) {
                return found;
            }
        }
    }

    /// Waits until the workload, population over, has done something.
    pub(crate) fn until_running(&mut self) {
        self.until(|event| match event {
            Event::Report(report) => (report.phase == "running" && report.operations > 0).then_some(()),
            _ => None,
        });
    }

    /// Reads to the end and returns what `run` returned.
    pub(crate) fn end(mut self) -> Result<ExitReport, VmmError> {
        while self.event().is_some() {}
        self.thread.join().unwrap()
    }
}

/// A client of a machine's inspection socket.
pub(crate) struct Inspector(BufReader<UnixStream>);

impl Inspector {
    pub(crate) fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(socket))
    }

    pub(crate) fn command(&mut self, command: Command) {
        let line = serde_json::to_string(&command).unwrap();
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    pub(crate) fn event(&mut self) -> Event {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("the machine should say something in time");
        serde_json::from_str(&line).expect(&line)
    }

    /// Whoever writes to it is told that nobody reads.
    pub(crate) fn hear_no_more(&self) {
        self.0.get_ref().shutdown(std::net::Shutdown::Read).unwrap();
    }
}

/// What the small manager does with the bytes of pages it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Honesty {
    /// Gives them back.
    Honest,
    /// Gives them back with a bit flipped.
    FlipsABit,
    /// Says that they are lost.
    Poisons,
}

/// A manager without policy: takes pages in turn as long as `take` is not zero, keeps their bytes, gives them back when
/// they are touched. Not one for guests that discard: see the race in `plimsoll_linux::uffd`.
pub(crate) struct Manager {
    thread: JoinHandle<()>,
    /// Pages to take on each round.
    pub(crate) take: Arc<AtomicU64>,
    /// Pages taken so far.
    pub(crate) taken: Arc<AtomicU64>,
    /// The pages returned dishonestly.
    pub(crate) tampered: Arc<Mutex<Vec<PageIndex>>>,
    quit: Arc<AtomicU64>,
}

impl Manager {
    /// Starts it, and returns the VMM's end of its socket.
    pub(crate) fn start(honesty: Honesty) -> (Self, OwnedFd) {
        let (socket, other) = fdpass::seqpacket_pair().unwrap();
        let counters: [Arc<AtomicU64>; 3] = Default::default();
        let [take, taken, quit] = counters.clone();
        let tampered = Arc::default();
        let list = Arc::clone(&tampered);
        let thread = thread::spawn(move || {
            let [take, taken, quit] = counters;
            let mut serving = Serving::welcome(socket, honesty, list);
            while quit.load(Ordering::SeqCst) == 0 {
                serving.faults();
                let pages = take.load(Ordering::SeqCst);
                taken.fetch_add(serving.take(u32::try_from(pages).unwrap()), Ordering::SeqCst);
            }
        });
        (Self { thread, take, taken, tampered, quit }, other)
    }

    /// Closes everything.
    pub(crate) fn quit(self) {
        self.quit.store(1, Ordering::SeqCst);
        self.thread.join().unwrap();
    }
}

struct Serving {
    socket: OwnedFd,
    hello: Hello,
    ram: Userfaultfd,
    kept: BTreeMap<u32, Box<PageBytes>>,
    next: u32,
    sequence: u32,
    honesty: Honesty,
    tampered: Arc<Mutex<Vec<PageIndex>>>,
    events: EventBuffer,
    _airlock: OwnedFd,
}

impl Serving {
    fn welcome(socket: OwnedFd, honesty: Honesty, tampered: Arc<Mutex<Vec<PageIndex>>>) -> Self {
        let mut buffer = [0; wire::DATAGRAM_MAX];
        let received = fdpass::recv(&socket, &mut buffer, 2).unwrap().unwrap();
        let mut descriptors = received.descriptors;
        let hello = Hello::decode(&buffer[..received.bytes], descriptors.len()).unwrap();
        let airlock = descriptors.pop().unwrap();
        let ram = Userfaultfd::try_from(descriptors.pop().unwrap()).unwrap();
        fdpass::send(&socket, &Welcome::Accepted { machine: 42, epoch: 1 }.encode(), &[]).unwrap();
        Self {
            socket,
            hello,
            ram,
            kept: BTreeMap::new(),
            next: 0,
            sequence: 0,
            honesty,
            tampered,
            events: EventBuffer::new(64),
            _airlock: airlock,
        }
    }

    fn hva(&self, page: PageIndex) -> Hva {
        let (region, offset) = self.hello.layout.locate(page).unwrap();
        self.hello.hvas[region].checked_add(offset).unwrap()
    }

    fn page(&self, hva: Hva) -> PageIndex {
        let regions = self.hello.layout.regions().iter().zip(&self.hello.hvas);
        let gpa = regions.filter_map(|(region, base)| {
            let offset = hva.0.checked_sub(base.0).filter(|offset| *offset < region.bytes.0)?;
            region.start.checked_add(offset)
        });
        self.hello.layout.index_of({ gpa }.next().unwrap()).unwrap()
    }

    /// Serves what waits, or waits a moment for it.
    fn faults(&mut self) {
        let mut ready = [PollFd::new(&self.ram, PollFlags::IN)];
        poll(&mut ready, Some(&Timespec { tv_sec: 0, tv_nsec: 2_000_000 })).unwrap();
        let events: Vec<_> = self.ram.read_events(&mut self.events).unwrap().collect();
        for event in events {
            match event {
                FaultEvent::PageFault { address, .. } => self.serve(address),
                FaultEvent::Remove { start, end } => {
                    let pages = (end.0 - start.0) / PAGE_SIZE as u64;
                    let first = self.page(start).0;
                    (first..)
                        .take(usize::try_from(pages).unwrap())
                        .for_each(|page| drop(self.kept.remove(&page)));
                }
                _ => {}
            }
        }
    }

    fn serve(&mut self, address: Hva) {
        let page = self.page(address);
        let range = HvaRange::new(address, ByteCount(PAGE_SIZE as u64)).unwrap();
        let Some(bytes) = self.kept.get_mut(&page.0) else {
            // Also for a second vCPU that waits for a page which is there by now.
            if !self.ram.zeropage(range, Wake::Yes).is_complete() {
                self.ram.wake(range).unwrap();
            }
            return;
        };
        if self.honesty != Honesty::Honest {
            self.tampered.lock().unwrap().push(page);
            bytes[100] ^= 4;
        }
        let done = if self.honesty == Honesty::Poisons {
            let done = self.ram.poison(range);
            self.ram.wake(range).unwrap();
            done
        } else {
            self.ram.copy(address, &bytes[..], Wake::Yes)
        };
        if done.is_complete() {
            self.kept.remove(&page.0);
        }
    }

    /// Takes up to `pages` pages from workload memory, whose indices start behind the first 6 MiB, and returns how many.
    fn take(&mut self, pages: u32) -> u64 {
        let first_of_workload = 6 * 256;
        if pages == 0 {
            return 0;
        }
        let limit = self.hello.layout.page_limit().0;
        if !(first_of_workload..limit).contains(&self.next) {
            self.next = first_of_workload;
        }
        let to_region_end = 512 - self.next % 512;
        let item = Item::new(PageIndex(self.next), SlotPage(0), pages.min(to_region_end).min(512));
        let Some(outcome) = self.ask(Op::MoveOut, item) else { return 0 };
        for offset in 0..outcome.done {
            let mut bytes = Box::new([0; PAGE_SIZE]);
            let slot = self.hello.airlock_base.checked_add(u64::from(offset) * PAGE_SIZE as u64).unwrap();
            let read = process_memory::read(ProcessId::own(), slot, &mut bytes[..]);
            if read.done != ByteCount(PAGE_SIZE as u64) {
                // The machine has ended; if it had not, the guest would find the page zero and say so.
                return 0;
            }
            self.kept.insert(self.next + offset, bytes);
        }
        if outcome.done > 0 {
            let zapped = self.ask(Op::Zap, Item::new(PageIndex(0), SlotPage(0), outcome.done));
            assert!(zapped.is_none_or(|zapped| zapped.stop.is_none()), "{zapped:?}");
        }
        // Past the page that stopped it.
        self.next += outcome.done.max(1);
        u64::from(outcome.done)
    }

    /// `None` when the machine has ended.
    fn ask(&mut self, op: Op, item: Item) -> Option<wire::Outcome> {
        self.sequence += 1;
        let ticket = Ticket { epoch: 1, sequence: self.sequence, op };
        let mut bytes = Vec::new();
        wire::encode_request(&mut bytes, ticket, &[item]);
        fdpass::send(&self.socket, &bytes, &[]).ok()?;
        let mut buffer = [0; wire::DATAGRAM_MAX];
        let received = fdpass::recv(self.socket.as_fd(), &mut buffer, 0).ok()??;
        wire::decode_reply(&buffer[..received.bytes], ticket, &[item]).unwrap().unwrap().first().copied()
    }
}

/// A manager of another process's machine that answers every fault with zeros until the machine has ended. Each of its
/// vCPUs owns its pages, so a page that a fault names is still absent.
pub(crate) fn zeros(socket: OwnedFd) {
    let mut serving = Serving::welcome(socket, Honesty::Honest, Arc::default());
    loop {
        serving.faults();
        let mut ready = [PollFd::new(&serving.socket, PollFlags::RDHUP)];
        poll(&mut ready, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
        if !ready[0].revents().is_empty() {
            return;
        }
    }
}
