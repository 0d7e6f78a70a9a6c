//! From a configuration to a running machine, in the order that the crate's documentation gives.
//!
//! Enters: configuration and sockets. Leaves: whatever [`Supervisor::run`] says. What must never happen: a vCPU running
//! before its memory is handed over, or any thread running the guest before the filter is on it.
use crate::config::{AccelChoice, Management, VmmConfig};
use crate::control::{Control, Event, Ram};
use crate::inspection::Inspection;
use crate::kvm::{self, KvmError};
use crate::machine::{End, Machine};
use crate::memory::{Managed, Memory, MemoryError, Shard};
use crate::probe::{self, Accel};
use crate::supervise::{ExitReport, Hold, ManagerEnd, Stop, Supervisor};
use crate::wire::{self, Hello, Welcome};
use crate::{VmmError, agent, boot, inprocess, sandbox, shards, signals};
use plimsoll_core::layout::GuestLayout;
use plimsoll_guest::frames::Plan;
use plimsoll_guest::{Guest, abi};
use plimsoll_linux::explain;
use plimsoll_sys::ProcessId;
use plimsoll_sys::eventfd::EventFd;
use plimsoll_sys::fdpass::{self, RecvError, SendError};
use plimsoll_sys::uffd::{Mode, OpenError};
use plimsoll_types::{ByteCount, Gpa};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::Shutdown;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use std::time::Instant;

/// How long a manager may take to welcome a machine.
const WELCOME_SECONDS: u64 = 10;

/// What will run the guest, before it has memory.
enum Engine {
    Kvm(kvm::Parts),
    InProcess,
}

/// What runs the guest's vCPUs, one element for each.
enum Vcpu {
    Kvm(kvm::Vcpu),
    InProcess { index: u32, params: Box<abi::Params>, start: Instant },
}

/// How a machine reaches its manager.
#[derive(Debug)]
pub enum Manager {
    /// A connected `SOCK_SEQPACKET` socket.
    Socket(OwnedFd),
    /// The path of the socket of that kind on which a daemon listens. A daemon whose manager dies before it has taken the
    /// machine is asked again.
    Daemon(PathBuf),
}

impl From<OwnedFd> for Manager {
    fn from(socket: OwnedFd) -> Self {
        Self::Socket(socket)
    }
}

/// Runs a machine to its end. `control` is a connected `SOCK_STREAM` socket to the starter.
///
/// # Errors
/// Any [`VmmError`]; nothing was started, or all of it has ended.
pub fn run(config: &VmmConfig, handover: Option<Manager>, control: OwnedFd) -> Result<ExitReport, VmmError> {
    let parent = ProcessId::parent();
    let layout = config.check()?;
    if config.management == Management::Managed && handover.is_none() {
        return Err(VmmError::NoManager);
    }
    let control = Control::new(control);
    signals::install().map_err(VmmError::Threads)?;
    let (engine, managed, accel) = open(config, &layout)?;
    let memory = Memory::map(layout, config.huge_pages, managed, &config.nodes())?;
    let (engine, tsc_hz) = match engine {
        Engine::Kvm(parts) => {
            let tsc_hz = parts.tsc_hz();
            (Engine::Kvm(parts), tsc_hz)
        }
        Engine::InProcess => (Engine::InProcess, inprocess::TICKS_PER_SECOND),
    };
    let params = config.params(memory.layout(), tsc_hz);
    // `check` has said that the program can run.
    let plan = Guest::new(&params).ok().and_then(|guest| guest.plan().copied());
    let entry = load(config, &memory, &params, plan.as_ref())?;
    let total_bytes = memory.layout().pages().bytes().0;
    let mut sent = Ok(());
    memory.prefault(config.prefault, |done| {
        let event = Event::Prefault { done_bytes: done.0, total_bytes };
        sent = control.send(&event);
    })?;
    sent.map_err(VmmError::Control)?;
    let vcpus = match engine {
        Engine::Kvm(parts) => parts.attach(&memory, entry)?.into_iter().map(Vcpu::Kvm).collect(),
        Engine::InProcess => in_process(config, &params),
    };
    memory.register()?;
    let accepted = match handover.filter(|_| config.management == Management::Managed) {
        Some(Manager::Socket(socket)) => Some(hand_over(config, &memory, socket)?),
        Some(Manager::Daemon(path)) => Some(hand_over_to_daemon(config, &memory, &path)?),
        None => None,
    };
    let inspection = match &config.inspect {
        Some(path) => {
            Inspection::listen(path).map_err(|source| VmmError::Inspection { path: path.clone(), source })?
        }
        None => Inspection::default(),
    };
    sandbox::drop_rights(config.sandbox, parent)?;

    let attention = EventFd::new().map_err(VmmError::Threads)?;
    let ram = ram(&memory);
    let machine = Arc::new(Machine::new(memory, plan, config.vcpus, tsc_hz, attention));
    let threads = Threads::start(&machine, vcpus, accepted.as_ref())?;
    let confined = sandbox::restrict(config, &accel);
    if confined.is_err() {
        machine.leave();
    }
    let started = Event::Started {
        name: config.name.clone(),
        pid: std::process::id(),
        accel,
        machine: accepted.as_ref().map(|accepted| accepted.machine),
        vcpus: config.vcpus,
        tsc_hz,
        ram,
    };
    let said = control.send(&started);
    threads.go.wait();
    let mut supervisor = Supervisor {
        machine,
        control,
        vcpus: threads.vcpus,
        agents: threads.agents,
        frames: threads.frames,
        manager: ManagerEnd::Present,
        died: None,
        stop: Stop::No,
        malformed: 0,
        started,
        inspection,
        question: None,
        hold: Hold::No,
    };
    let ended = confined
        .map_err(VmmError::from)
        .and_then(|()| said.map_err(VmmError::Control))
        .and_then(|()| supervisor.run(config));
    for socket in accepted.iter().flat_map(|accepted| &accepted.sockets) {
        // Frees the agent from its wait. A manager that is gone already has the same effect.
        let _ = rustix::net::shutdown(socket, Shutdown::Both);
    }
    let malformed_requests = supervisor.join_agents();
    Ok(ExitReport { malformed_requests: malformed_requests?, ..ended? })
}

/// Chooses what runs the guest, and opens what a manager will need.
fn open(config: &VmmConfig, layout: &GuestLayout) -> Result<(Engine, Vec<Managed>, Accel), VmmError> {
    let shards = match config.management {
        Management::Managed => {
            config.shards.unwrap_or_else(|| shards::suitable(layout.pages().bytes(), config.nodes.len()))
        }
        Management::Unmanaged => 0,
    };
    let managed = |mode| -> Result<Vec<Managed>, MemoryError> {
        (0..shards).map(|_| Managed::open(mode, config.airlock_slots)).collect()
    };
    let because = match config.accel {
        AccelChoice::InProcess => "it was asked for".to_owned(),
        choice => match open_kvm(config, layout) {
            Err(error) if choice == AccelChoice::Kvm => return Err(error.into()),
            Err(error) => explain(&error),
            // KVM reaches guest memory from the kernel, so user-mode faults alone would not do.
            Ok(parts) => match managed(Mode::KernelAndUser) {
                Err(MemoryError::Open(error @ OpenError::NotPermitted { .. }))
                    if choice == AccelChoice::Auto =>
                {
                    explain(&error)
                }
                opened => {
                    let accel = probe::describe_kvm(Path::new("/sys/module"));
                    return Ok((Engine::Kvm(parts), opened?, accel));
                }
            },
        },
    };
    let opened = match managed(Mode::KernelAndUser) {
        Err(MemoryError::Open(OpenError::NotPermitted { .. })) => managed(Mode::UserOnly)?,
        opened => opened?,
    };
    Ok((Engine::InProcess, opened, Accel::InProcess { because }))
}

fn open_kvm(config: &VmmConfig, layout: &GuestLayout) -> Result<kvm::Parts, KvmError> {
    kvm::Parts::create(&kvm::Host::open()?, config.vcpus, layout.regions().len())
}

/// Fills memory with what it must hold at the start, and pins what the VMM itself reads and writes.
fn load(
    config: &VmmConfig,
    memory: &Memory,
    params: &abi::Params,
    plan: Option<&Plan>,
) -> Result<Gpa, VmmError> {
    let (entry, mut pieces) = boot::image()?;
    pieces.push(boot::page_tables(memory.layout())?);
    pieces.push(boot::params_piece(params));
    for piece in &pieces {
        // Memory is written in words; what follows a piece is zero.
        let mut bytes = piece.bytes.to_vec();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        memory.write(piece.start, &bytes)?;
    }
    let pinned = abi::channel_gpa(config.vcpus) - abi::PARAMS_GPA;
    memory.pin_for_life(Gpa(abi::PARAMS_GPA), ByteCount(pinned))?;
    if let Some(plan) = plan {
        memory.pin_for_life(Gpa(abi::LISTING_GPA), ByteCount(abi::PAGE_SIZE))?;
        // Whoever looks for free frames waits for no page.
        memory.pin_for_life(Gpa(plan.word_gpa(0)), ByteCount(plan.words() * 8))?;
    }
    Ok(entry)
}

fn in_process(config: &VmmConfig, params: &abi::Params) -> Vec<Vcpu> {
    // One clock for all vCPUs.
    let start = Instant::now();
    (0..config.vcpus).map(|index| Vcpu::InProcess { index, params: Box::new(*params), start }).collect()
}

/// Where the regions are, for whoever looks at them from outside.
fn ram(memory: &Memory) -> Vec<Ram> {
    let regions = memory.layout().regions().iter().zip(memory.hvas());
    regions.map(|(region, hva)| Ram { gpa: region.start.0, hva: hva.0, bytes: region.bytes.0 }).collect()
}

/// What a manager says of a machine that it takes.
struct Accepted {
    machine: u32,
    epoch: u64,
    /// What the agent of each shard is to serve.
    sockets: Vec<Arc<OwnedFd>>,
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> VmmError {
    VmmError::Handover(io::Error::other(error))
}

/// Hands the machine to a daemon's manager, and to the next one as often as that one dies before it has taken it: until it is
/// welcomed it belongs to nobody.
fn hand_over_to_daemon(config: &VmmConfig, memory: &Memory, path: &Path) -> Result<Accepted, VmmError> {
    let since = Instant::now();
    loop {
        let outcome = connect(path).and_then(|socket| hand_over(config, memory, socket));
        match outcome {
            Err(VmmError::Dropped) if since.elapsed().as_secs() < WELCOME_SECONDS => {}
            outcome => return outcome,
        }
    }
}

fn connect(path: &Path) -> Result<OwnedFd, VmmError> {
    fdpass::seqpacket_connect(path).map_err(|error| {
        let why = format!("cannot connect to {}: {error}; is `plimsoll daemon` running?", path.display());
        VmmError::Handover(io::Error::other(why))
    })
}

/// Introduces the machine, shard by shard, and waits for its identity and the first epoch.
fn hand_over(config: &VmmConfig, memory: &Memory, socket: OwnedFd) -> Result<Accepted, VmmError> {
    let shards = u32::try_from(memory.shards().len()).unwrap_or(u32::MAX);
    for (shard, index) in memory.shards().iter().zip(0..) {
        let Shard { cut, managed } = shard;
        let hello = Hello {
            name: config.name.clone(),
            shard: index,
            shards,
            layout: cut.layout.clone(),
            hvas: memory.parts(shard)?.into_iter().map(|(_, range)| range.start()).collect(),
            airlock_base: managed.airlock.base(),
            airlock_slots: managed.slots,
            features: managed.features(),
        };
        let descriptors = [managed.ram.as_fd(), managed.airlock_uffd.as_fd()];
        match fdpass::send(&socket, &hello.encode(), &descriptors) {
            Err(SendError::Closed) => return Err(VmmError::Dropped),
            sent => sent.map_err(failed)?,
        };
    }
    let limit = Timespec { tv_sec: i64::try_from(WELCOME_SECONDS).unwrap_or(1), tv_nsec: 0 };
    let mut ready = [PollFd::new(&socket, PollFlags::IN)];
    if poll(&mut ready, Some(&limit)).map_err(|errno| VmmError::Handover(errno.into()))? == 0 {
        return Err(VmmError::Silent { seconds: WELCOME_SECONDS });
    }
    let mut buffer = [0; wire::DATAGRAM_MAX];
    let further = memory.shards().len().saturating_sub(1);
    let received = match fdpass::recv(&socket, &mut buffer, further) {
        Ok(None) | Err(RecvError::Reset) => return Err(VmmError::Dropped),
        received => received.map_err(failed)?,
    };
    let (bytes, sockets) = received.map_or((0, Vec::new()), |got| (got.bytes, got.descriptors));
    match Welcome::decode(buffer.get(..bytes).unwrap_or_default())? {
        Welcome::Accepted { .. } if sockets.len() != further => {
            Err(wire::WireError::Descriptors { found: sockets.len(), expected: further }.into())
        }
        Welcome::Accepted { machine, epoch } => {
            let sockets = [socket].into_iter().chain(sockets).map(Arc::new).collect();
            Ok(Accepted { machine, epoch, sockets })
        }
        Welcome::Refused { reason } => Err(wire::WireError::Refused { reason }.into()),
        Welcome::GivenBack => {
            Err(wire::WireError::Refused { reason: "it was given back at once".to_owned() }.into())
        }
    }
}

/// The machine's threads, all of which wait at `go`.
struct Threads {
    go: Arc<Barrier>,
    vcpus: Vec<JoinHandle<()>>,
    agents: Vec<JoinHandle<agent::Ended>>,
    frames: Option<JoinHandle<()>>,
}

impl Threads {
    /// Starts them and waits until each has made the system calls that a thread's start needs.
    fn start(
        machine: &Arc<Machine>,
        vcpus: Vec<Vcpu>,
        accepted: Option<&Accepted>,
    ) -> Result<Self, VmmError> {
        let agents = accepted.map_or(0, |accepted| accepted.sockets.len());
        let frames = machine.balloon.has_frames();
        let threads = vcpus.len() + agents + usize::from(frames) + 1;
        let (ready, go) = (Arc::new(Barrier::new(threads)), Arc::new(Barrier::new(threads)));
        let mut started = Self { go: Arc::clone(&go), vcpus: Vec::new(), agents: Vec::new(), frames: None };
        let gates = || {
            let (ready, go) = (Arc::clone(&ready), Arc::clone(&go));
            move || {
                ready.wait();
                go.wait();
            }
        };
        for (vcpu, index) in vcpus.into_iter().zip(0u32..) {
            let (machine, pass) = (Arc::clone(machine), gates());
            let thread = thread::Builder::new().name(format!("vcpu{index}")).spawn(move || {
                pass();
                let end = vcpu.run(&machine);
                machine.ended(index, end);
            });
            started.vcpus.push(thread.map_err(VmmError::Threads)?);
        }
        let sockets = accepted.iter().flat_map(|accepted| &accepted.sockets);
        let epoch = accepted.map_or(0, |accepted| accepted.epoch);
        for (socket, shard) in sockets.zip(0..) {
            let (machine, socket, pass) = (Arc::clone(machine), Arc::clone(socket), gates());
            let thread = thread::Builder::new().name(format!("agent{shard}")).spawn(move || {
                pass();
                let ended = agent::serve(socket.as_fd(), &machine.memory, shard, epoch);
                let _ = machine.attention.signal();
                ended
            });
            started.agents.push(thread.map_err(VmmError::Threads)?);
        }
        if frames {
            let (machine, pass) = (Arc::clone(machine), gates());
            let thread = thread::Builder::new().name("frames".to_owned()).spawn(move || {
                pass();
                machine.balloon.serve(&machine.memory, || {
                    let _ = machine.attention.signal();
                });
            });
            started.frames = Some(thread.map_err(VmmError::Threads)?);
        }
        ready.wait();
        Ok(started)
    }
}

impl Vcpu {
    fn run(self, machine: &Machine) -> End {
        match self {
            Self::Kvm(mut vcpu) => vcpu.run(machine),
            Self::InProcess { index, params, start } => inprocess::run(machine, &params, index, start),
        }
    }
}
