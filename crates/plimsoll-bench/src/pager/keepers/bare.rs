//! The least that userfaultfd can do: wait, read one event, copy a page that lies ready in a buffer.
//!
//! It shares the way to hand memory over with the pager, and the VMM's agent that takes pages out; nothing of how faults
//! are served. Its guest is started with all pages present, so every page that is missed is one that was taken.
use super::{Keeper, Taken, check_away};
use crate::guest::{Guest, pages_in};
use crate::pager::Scene;
use crate::session::BenchError;
use anyhow::{Context, Result, bail, ensure};
use plimsoll_linux::uffd::waiting::Waiting;
use plimsoll_linux::uffd::wire::{self, Hello, Item, Op, Outcome, Ticket, Welcome};
use plimsoll_sys::eventfd::EventFd;
use plimsoll_sys::uffd::{Event, EventBuffer, Userfaultfd, Wake};
use plimsoll_sys::{HvaRange, fdpass, process_memory};
use plimsoll_types::{BLOCK_PAGES, ByteCount, Hva, PAGE_SIZE, PageIndex, SlotPage};
use plimsoll_vmm::VmmConfig;
use plimsoll_vmm::config::Prefault;
use rustix::event::{PollFd, PollFlags, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// As long as the pager looks for the next fault before it sleeps.
const AWAKE: Duration = Duration::from_micros(100);
/// The first manager of a machine has this epoch.
const EPOCH: u64 = 1;

/// A guest and the thread that serves its faults. The guest ends first.
pub(crate) struct Bare {
    guest: Guest,
    agent: Agent,
    ram: HvaRange,
    /// What the thread copies from and when it ends; none while there is no thread.
    server: Option<Server>,
    idle: Option<Loop>,
}

/// The way to the VMM's agent.
struct Agent {
    socket: OwnedFd,
    airlock_base: Hva,
    /// The last copy of a userfaultfd must not close while pages are away.
    _airlock: OwnedFd,
    sequence: u32,
}

impl Agent {
    fn ask(&mut self, op: Op, item: Item) -> Result<Outcome> {
        self.sequence += 1;
        let ticket = Ticket { epoch: EPOCH, sequence: self.sequence, op };
        let mut request = Vec::new();
        wire::encode_request(&mut request, ticket, &[item]);
        fdpass::send(&self.socket, &request, &[])?;
        let mut reply = vec![0; wire::DATAGRAM_MAX];
        let received = fdpass::recv(&self.socket, &mut reply, 0)?.context("the agent is gone")?;
        let outcomes = wire::decode_reply(&reply[..received.bytes], ticket, &[item])?;
        let outcomes = outcomes.context("the agent answered something else")?;
        outcomes.first().copied().context("the agent answered nothing")
    }
}

/// What serves faults.
struct Loop {
    uffd: Userfaultfd,
    base: Hva,
    /// How long it looks for the next fault before it sleeps.
    awake: Duration,
    /// The bytes of every page, where it lies in guest memory.
    pages: Vec<u8>,
}

struct Server {
    stop: Arc<EventFd>,
    thread: JoinHandle<Result<Loop>>,
}

impl Loop {
    fn start(self) -> Result<Server> {
        let stop = Arc::new(EventFd::new()?);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("bare".to_owned());
        Ok(Server { stop, thread: thread.spawn(move || self.serve(&stopped))? })
    }

    /// Until it is told to stop.
    fn serve(self, stop: &EventFd) -> Result<Self> {
        let mut one = EventBuffer::new(1);
        let mut served = Instant::now();
        loop {
            if self.serve_one(&mut one)? {
                served = Instant::now();
                continue;
            }
            if served.elapsed() < self.awake {
                std::thread::yield_now();
                continue;
            }
            let mut ready = [PollFd::new(&self.uffd, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
            poll(&mut ready, None)?;
            if !ready[1].revents().is_empty() {
                return Ok(self);
            }
        }
    }

    /// Serves a fault, if one waits.
    fn serve_one(&self, one: &mut EventBuffer) -> Result<bool> {
        let Some(event) = self.uffd.read_events(one)?.next() else { return Ok(false) };
        let Event::PageFault { address, .. } = event else { bail!("{event:?} instead of a fault") };
        let offset = usize::try_from(address.0 - self.base.0)? / PAGE_SIZE * PAGE_SIZE;
        let page = self.base.checked_add(offset as u64).context("a fault out of reach")?;
        let bytes = self.pages.get(offset..offset + PAGE_SIZE).context("a fault outside")?;
        let copied = self.uffd.copy(page, bytes, Wake::Yes);
        if !copied.is_complete() {
            // Another thread of the guest's process has asked for the same page.
            let page = HvaRange::new(page, ByteCount(PAGE_SIZE as u64)).context("no page")?;
            self.uffd.wake(page).map_err(|stop| anyhow::anyhow!("cannot wake: {stop:?}"))?;
        }
        Ok(true)
    }
}

impl Server {
    fn end(self) -> Result<Loop> {
        self.stop.signal()?;
        self.thread.join().map_err(|_| anyhow::anyhow!("the bare loop panicked"))?
    }
}

impl Bare {
    /// Takes every page that the agent gives.
    fn take(&mut self, pages: &mut [u8]) -> Result<()> {
        let all = u32::try_from(pages_in(self.ram))?;
        let mut next = 0;
        while next < all {
            let to_block_end = BLOCK_PAGES - next % BLOCK_PAGES;
            let item = Item::new(PageIndex(next), SlotPage(0), to_block_end.min(all - next));
            let outcome = self.agent.ask(Op::MoveOut, item)?;
            if outcome.done > 0 {
                let (from, len) = (next as usize * PAGE_SIZE, outcome.done as usize * PAGE_SIZE);
                let process = self.guest.process().process();
                let read =
                    process_memory::read(process, self.agent.airlock_base, &mut pages[from..from + len]);
                if read.done != ByteCount(len as u64) {
                    bail!("a guest's pages cannot be read: {:?}", read.stop);
                }
                let zapped = self.agent.ask(Op::Zap, Item::new(PageIndex(0), SlotPage(0), outcome.done))?;
                ensure!(zapped.stop.is_none(), "the airlock cannot be emptied: {:?}", zapped.stop);
            }
            // Past the page that stopped it, which is pinned or away already.
            next += outcome.done + u32::from(outcome.stop.is_some());
        }
        Ok(())
    }
}

impl Keeper for Bare {
    fn start(config: &VmmConfig, scene: &Scene<'_>) -> Result<Self, BenchError> {
        let config = VmmConfig { prefault: Prefault::All, ..config.clone() };
        let (mut guest, socket) = Guest::launch(&config, scene.interrupt)?;
        let (agent, uffd) = welcome(socket).context("cannot take a guest over")?;
        guest.until_started()?;
        let [ram] = guest.ram()[..] else {
            return Err(anyhow::anyhow!("a guest of more than one region").into());
        };
        let awake = match scene.waiting {
            Waiting::Asleep => Duration::ZERO,
            Waiting::Adaptive => AWAKE,
        };
        let idle = Loop {
            uffd,
            base: ram.start(),
            awake,
            pages: vec![0; usize::try_from(ram.len().0).unwrap_or(0)],
        };
        Ok(Self { guest, agent, ram, server: None, idle: Some(idle) })
    }

    fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }

    fn page_out(&mut self) -> Result<Taken, BenchError> {
        let ended = self.server.take().map(Server::end).transpose()?;
        let mut serving = ended.or(self.idle.take()).context("the bare loop is lost")?;
        let before = self.guest.present()?;
        let (cpu, start) = (self.guest.cpu_seconds()?, Instant::now());
        let mut pages = std::mem::take(&mut serving.pages);
        let taken = self.take(&mut pages);
        let seconds = start.elapsed().as_secs_f64();
        serving.pages = pages;
        self.server = Some(serving.start()?);
        taken?;
        let cpu_seconds = self.guest.cpu_seconds()? - cpu;
        check_away("the bare loop", &self.guest)?;
        Ok(Taken { pages: before.saturating_sub(self.guest.present()?) as u64, seconds, cpu_seconds })
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            let _ = server.end();
        }
    }
}

/// Accepts what a VMM hands over.
fn welcome(socket: OwnedFd) -> Result<(Agent, Userfaultfd)> {
    let mut bytes = vec![0; wire::DATAGRAM_MAX];
    let received = fdpass::recv(socket.as_fd(), &mut bytes, 2)?.context("it handed nothing over")?;
    let hello = Hello::decode(&bytes[..received.bytes], received.descriptors.len())?;
    let mut descriptors = received.descriptors.into_iter();
    let (ram, airlock) = (descriptors.next().context("no RAM")?, descriptors.next().context("no airlock")?);
    fdpass::send(&socket, &Welcome::Accepted { machine: 1, epoch: EPOCH }.encode(), &[])?;
    let agent = Agent { socket, airlock_base: hello.airlock_base, _airlock: airlock, sequence: 0 };
    Ok((agent, Userfaultfd::try_from(ram)?))
}
