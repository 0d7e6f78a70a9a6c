//! userfaultfd against the running kernel. A thread that touches memory may wait for ever if the code under test is
//! wrong, so touches happen in threads of their own and are awaited with a limit.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use plimsoll_sys::mapping::{AnonymousMapping, HugePages, Memfd, SharedMapping};
use plimsoll_sys::pagemap::Pagemap;
use plimsoll_sys::process_memory::{self, Refusal};
use plimsoll_sys::uffd::{
    Access, AdoptError, Event, EventBuffer, FaultKind, Features, HandshakeError, Holes, Ioctls, Mode,
    MoveMode, Outcome, Protection, RegisterError, RegisterMode, Stop, Userfaultfd, Wake,
};
use plimsoll_sys::{HvaRange, ProcessId, UnborrowedRange};
use plimsoll_types::{BLOCK_SIZE, ByteCount, Hva, PAGE_SIZE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(180);
const PAGE: u64 = PAGE_SIZE as u64;
const MOVE_ALL: MoveMode = MoveMode { wake: Wake::Yes, holes: Holes::Refuse };

/// A descriptor after its handshake, or `None` (and a line saying so) where this machine has no right to one.
fn uffd(features: Features) -> Option<Userfaultfd> {
    match Userfaultfd::open(Mode::KernelAndUser) {
        Ok(uffd) => {
            uffd.handshake(features).expect("handshake");
            Some(uffd)
        }
        Err(error) => {
            println!("SKIPPED: {error}");
            None
        }
    }
}

fn map(pages: u64) -> Arc<AnonymousMapping> {
    Arc::new(AnonymousMapping::new(ByteCount(pages * PAGE), HugePages::Never).expect("mmap"))
}

fn pages(mapping: &AnonymousMapping, first: u64, count: u64) -> HvaRange {
    HvaRange::new(Hva(mapping.base().0 + first * PAGE), ByteCount(count * PAGE)).unwrap()
}

fn register(uffd: &Userfaultfd, mapping: &AnonymousMapping, mode: RegisterMode) -> Ioctls {
    uffd.register(mapping.unborrowed(mapping.range()).unwrap(), mode).expect("register")
}

fn in_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (done, result) = channel();
    thread::spawn(move || {
        let _ = done.send(work());
    });
    result
}

fn next_event(uffd: &Userfaultfd) -> Event {
    let limit = Timespec::try_from(LIMIT).unwrap();
    let ready = poll(&mut [PollFd::new(uffd, PollFlags::IN)], Some(&limit)).unwrap();
    assert_eq!(ready, 1, "no event within {LIMIT:?}");
    let mut buffer = EventBuffer::new(1);
    uffd.read_events(&mut buffer).unwrap().next().expect("poll said there is an event")
}

fn done(outcome: Outcome) -> u64 {
    assert_eq!(outcome.stop, None);
    outcome.done.0 / PAGE
}

#[test]
fn the_kernel_says_what_it_supports_and_refuses_the_rest() {
    let reply = Userfaultfd::supported().unwrap();
    println!("features {:?}", reply.features);
    assert!(reply.ioctls.contains(Ioctls::REGISTER | Ioctls::API));
    let unknown = Features::from_bits_retain(1 << 60);
    let error = Userfaultfd::open(Mode::UserOnly).unwrap().handshake(unknown).unwrap_err();
    assert!(matches!(error, HandshakeError::Refused { requested } if requested == unknown), "{error}");
}

#[test]
fn a_missing_page_is_reported_and_filled_by_copy() {
    let Some(uffd) = uffd(Features::THREAD_ID) else { return };
    let memory = map(4);
    let calls = register(&uffd, &memory, RegisterMode::MISSING);
    assert!(calls.contains(Ioctls::COPY | Ioctls::ZEROPAGE | Ioctls::WAKE));
    let reader = Arc::clone(&memory);
    let value = in_thread(move || reader.read_u64(ByteCount(PAGE + 8)).unwrap());

    match next_event(&uffd) {
        Event::PageFault { address, access, kind, thread } => {
            assert_eq!(address, pages(&memory, 1, 1).start());
            assert_eq!((access, kind), (Access::Read, FaultKind::Missing));
            assert!(thread.is_some());
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(done(uffd.copy(pages(&memory, 1, 1).start(), &[0xab; PAGE_SIZE], Wake::Yes)), 1);
    assert_eq!(value.recv_timeout(LIMIT).unwrap(), 0xabab_abab_abab_abab);
}

#[test]
fn a_copy_without_wake_leaves_the_reader_waiting_until_it_is_woken() {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let memory = map(1);
    register(&uffd, &memory, RegisterMode::MISSING);
    let reader = Arc::clone(&memory);
    let value = in_thread(move || reader.read_u64(ByteCount(0)).unwrap());
    assert!(matches!(next_event(&uffd), Event::PageFault { .. }));
    assert_eq!(done(uffd.copy(memory.base(), &[1; PAGE_SIZE], Wake::No)), 1);
    assert!(value.recv_timeout(Duration::from_millis(50)).is_err(), "went on without being woken");
    uffd.wake(memory.range()).unwrap();
    assert_eq!(value.recv_timeout(LIMIT).unwrap(), 0x0101_0101_0101_0101);
}

#[test]
fn zeropage_fills_and_a_second_fill_says_exists() {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let memory = map(4);
    register(&uffd, &memory, RegisterMode::MISSING);
    assert_eq!(done(uffd.zeropage(pages(&memory, 2, 2), Wake::Yes)), 2);
    assert_eq!(memory.read_u64(ByteCount(2 * PAGE)).unwrap(), 0);
    let again = uffd.copy(pages(&memory, 2, 1).start(), &[1; PAGE_SIZE], Wake::Yes);
    assert_eq!(again, Outcome { done: ByteCount(0), stop: Some(Stop::Exists) });
    // Running into it counts what came before.
    let into = uffd.copy(memory.base(), &[1; 4 * PAGE_SIZE], Wake::Yes);
    assert_eq!(into, Outcome { done: ByteCount(2 * PAGE), stop: Some(Stop::Again) });
}

#[test]
fn copies_that_make_no_sense_are_refused() {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let memory = map(2);
    let stop = |dst, bytes: &[u8]| uffd.copy(dst, bytes, Wake::Yes).stop;
    assert_eq!(stop(memory.base(), &[0; PAGE_SIZE]), Some(Stop::NotMapped), "not registered");
    register(&uffd, &memory, RegisterMode::MISSING);
    assert_eq!(stop(memory.base(), &[0; 100]), Some(Stop::Invalid), "not whole pages");
    assert_eq!(stop(memory.base(), &[]), Some(Stop::Invalid), "nothing");
    assert_eq!(stop(Hva(memory.base().0 + 8), &[0; PAGE_SIZE]), Some(Stop::Invalid), "unaligned");
}

/// Faults that wait and were not read yet, as the kernel counts them.
fn unread(uffd: &Userfaultfd) -> usize {
    let about = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", uffd.as_fd().as_raw_fd())).unwrap();
    about.lines().find_map(|line| line.strip_prefix("pending:")).unwrap().trim().parse().unwrap()
}

#[test]
fn many_faults_are_read_in_one_batch() {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let memory = map(8);
    register(&uffd, &memory, RegisterMode::MISSING);
    let readers: Vec<_> = (0..8)
        .map(|page| {
            let memory = Arc::clone(&memory);
            in_thread(move || memory.read_u64(ByteCount(page * PAGE)).unwrap())
        })
        .collect();
    let start = Instant::now();
    while unread(&uffd) < 8 {
        assert!(start.elapsed() < LIMIT, "{} of 8 faults have come", unread(&uffd));
        thread::yield_now();
    }
    let mut buffer = EventBuffer::new(32);
    let page = |event| {
        let Event::PageFault { address, .. } = event else { panic!("{event:?}") };
        (address.0 - memory.base().0) / PAGE
    };
    let mut seen: Vec<u64> = uffd.read_events(&mut buffer).unwrap().map(page).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..8).collect::<Vec<_>>());
    assert_eq!(uffd.read_events(&mut buffer).unwrap().len(), 0, "nothing left, and no wait");
    assert_eq!(done(uffd.zeropage(memory.range(), Wake::Yes)), 8);
    for reader in readers {
        assert_eq!(reader.recv_timeout(LIMIT).unwrap(), 0);
    }
}

/// RAM that is registered, and an airlock that is not.
fn ram_and_airlock(uffd: &Userfaultfd, count: u64) -> (Arc<AnonymousMapping>, Arc<AnonymousMapping>) {
    let (ram, airlock) = (map(count), map(count));
    for page in 0..count {
        ram.write_u64(ByteCount(page * PAGE), page + 1).unwrap();
    }
    register(uffd, &ram, RegisterMode::MISSING);
    (ram, airlock)
}

#[test]
fn pages_move_out_and_back_with_their_bytes() {
    let Some(ram_uffd) = uffd(Features::MOVE) else { return };
    let Some(airlock_uffd) = uffd(Features::MOVE) else { return };
    let (ram, airlock) = ram_and_airlock(&ram_uffd, 8);
    register(&airlock_uffd, &airlock, RegisterMode::MISSING);

    let out = airlock_uffd.move_pages(airlock.base(), ram.unborrowed(ram.range()).unwrap(), MOVE_ALL);
    assert_eq!(done(out), 8);
    for page in 0..8 {
        assert_eq!(airlock.read_u64(ByteCount(page * PAGE)).unwrap(), page + 1);
    }
    let map = Pagemap::open(ProcessId::own()).unwrap();
    assert_eq!(map.populated_bytes(ram.range()).unwrap(), ByteCount(0), "the source is empty");

    let back = airlock.unborrowed(pages(&airlock, 3, 1)).unwrap();
    assert_eq!(done(ram_uffd.move_pages(pages(&ram, 3, 1).start(), back, MOVE_ALL)), 1);
    assert_eq!(ram.read_u64(ByteCount(3 * PAGE)).unwrap(), 4);
}

#[test]
fn a_move_stops_at_a_hole_unless_holes_are_allowed() {
    let Some(uffd) = uffd(Features::MOVE) else { return };
    let (source, target) = (map(8), map(8));
    register(&uffd, &target, RegisterMode::MISSING);
    for page in [0, 1, 2, 4, 5, 6, 7] {
        source.write_u64(ByteCount(page * PAGE), page + 1).unwrap();
    }
    let all = source.unborrowed(source.range()).unwrap();
    let stopped = uffd.move_pages(target.base(), all, MOVE_ALL);
    assert_eq!(stopped, Outcome { done: ByteCount(3 * PAGE), stop: Some(Stop::Again) });
    let rest = all.skip(stopped.done).unwrap();
    let dst = Hva(target.base().0 + stopped.done.0);
    let at_hole = uffd.move_pages(dst, rest, MOVE_ALL);
    assert_eq!(at_hole, Outcome { done: ByteCount(0), stop: Some(Stop::NotMapped) }, "the retry says why");
    let through = uffd.move_pages(dst, rest, MoveMode { holes: Holes::Allow, ..MOVE_ALL });
    assert_eq!(done(through), 5);
    assert_eq!(target.read_u64(ByteCount(7 * PAGE)).unwrap(), 8);
    let hole = uffd.zeropage(pages(&target, 3, 1), Wake::Yes);
    assert_eq!(done(hole), 1, "the hole came along as a hole");
}

#[test]
fn a_whole_huge_page_moves_in_one_call() {
    let Some(uffd) = uffd(Features::MOVE) else { return };
    let block = ByteCount(BLOCK_SIZE as u64);
    let source = AnonymousMapping::new(block, HugePages::Prefer).unwrap();
    let target = AnonymousMapping::new(block, HugePages::Prefer).unwrap();
    source.populate_write(source.range()).unwrap();
    source.collapse(source.range()).unwrap();
    source.write_u64(ByteCount(block.0 - 8), 77).unwrap();
    register(&uffd, &target, RegisterMode::MISSING);
    let moved = uffd.move_pages(target.base(), source.unborrowed(source.range()).unwrap(), MOVE_ALL);
    assert_eq!(done(moved), 512);
    assert_eq!(target.read_u64(ByteCount(block.0 - 8)).unwrap(), 77);
}

#[test]
fn poison_is_an_unreadable_page_and_not_wrong_bytes() {
    let Some(uffd) = uffd(Features::POISON) else { return };
    let memory = map(2);
    register(&uffd, &memory, RegisterMode::MISSING);
    assert_eq!(done(uffd.poison(pages(&memory, 0, 1))), 1);
    // Read through the kernel, which answers with an error where a direct touch would raise SIGBUS.
    let mut bytes = [0; PAGE_SIZE];
    let base = memory.base();
    let read = in_thread(move || process_memory::read(ProcessId::own(), base, &mut bytes));
    let read = read.recv_timeout(LIMIT).unwrap();
    assert_eq!((read.done, read.stop), (ByteCount(0), Some(Refusal::NotMapped)));
    // What `pagemap` says about poison: it counts as populated.
    let map = Pagemap::open(ProcessId::own()).unwrap();
    assert_eq!(map.populated_bytes(memory.range()).unwrap(), ByteCount(PAGE));
    // A good copy found later may still replace it.
    assert_eq!(done(uffd.copy(base, &[1; PAGE_SIZE], Wake::Yes)), 1);
    assert_eq!(memory.read_u64(ByteCount(0)).unwrap(), 0x0101_0101_0101_0101);
}

#[test]
fn a_discard_waits_for_its_event_and_installs_are_refused_meanwhile() {
    let Some(uffd) = uffd(Features::EVENT_REMOVE) else { return };
    let memory = map(4);
    memory.write_u64(ByteCount(0), 1).unwrap();
    register(&uffd, &memory, RegisterMode::MISSING);
    let discarder = Arc::clone(&memory);
    let first_two = pages(&memory, 0, 2);
    let discarded = in_thread(move || discarder.discard(first_two).unwrap());

    let limit = Timespec::try_from(LIMIT).unwrap();
    assert_eq!(poll(&mut [PollFd::new(&uffd, PollFlags::IN)], Some(&limit)).unwrap(), 1);
    let refused = uffd.copy(pages(&memory, 3, 1).start(), &[1; PAGE_SIZE], Wake::Yes);
    assert_eq!(refused, Outcome { done: ByteCount(0), stop: Some(Stop::Again) });
    assert!(discarded.try_recv().is_err(), "the discarder went on before its event was read");
    match next_event(&uffd) {
        Event::Remove { start, end } => assert_eq!((start, end), (first_two.start(), first_two.end())),
        other => panic!("{other:?}"),
    }
    discarded.recv_timeout(LIMIT).unwrap();
    assert_eq!(done(uffd.copy(pages(&memory, 3, 1).start(), &[1; PAGE_SIZE], Wake::Yes)), 1);
}

#[test]
fn a_write_to_a_protected_page_waits_for_its_release() {
    let Some(uffd) = uffd(Features::PAGEFAULT_FLAG_WP) else { return };
    let memory = map(1);
    memory.write_u64(ByteCount(0), 1).unwrap();
    register(&uffd, &memory, RegisterMode::WRITE_PROTECT);
    uffd.write_protect(memory.range(), Protection::Protect).unwrap();
    let writer = Arc::clone(&memory);
    let written = in_thread(move || writer.write_u64(ByteCount(0), 2).unwrap());
    match next_event(&uffd) {
        Event::PageFault { access, kind, .. } => {
            assert_eq!((access, kind), (Access::Write, FaultKind::WriteProtect));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(memory.read_u64(ByteCount(0)).unwrap(), 1);
    uffd.write_protect(memory.range(), Protection::Release(Wake::Yes)).unwrap();
    written.recv_timeout(LIMIT).unwrap();
    assert_eq!(memory.read_u64(ByteCount(0)).unwrap(), 2);
}

#[test]
fn a_range_belongs_to_one_userfaultfd() {
    let (Some(first), Some(second)) = (uffd(Features::empty()), uffd(Features::empty())) else { return };
    let memory = map(1);
    register(&first, &memory, RegisterMode::MISSING);
    let again = second.register(memory.unborrowed(memory.range()).unwrap(), RegisterMode::MISSING);
    assert!(matches!(again, Err(RegisterError::Taken { .. })), "{again:?}");
    first.unregister(memory.range()).unwrap();
    assert_eq!(memory.read_u64(ByteCount(0)).unwrap(), 0, "a hole reads as zero after the registration");
    register(&second, &memory, RegisterMode::MISSING);
}

#[test]
fn only_a_userfaultfd_is_adopted_and_becomes_nonblocking() {
    let (socket, _) = plimsoll_sys::fdpass::seqpacket_pair().unwrap();
    let error = Userfaultfd::try_from(socket).unwrap_err();
    assert!(matches!(error, AdoptError::NotUserfaultfd { .. }), "{error}");
    let Some(uffd) = uffd(Features::empty()) else { return };
    let fd = OwnedFd::from(uffd);
    let blocking = rustix::fs::fcntl_getfl(&fd).unwrap() - rustix::fs::OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(&fd, blocking).unwrap();
    let adopted = Userfaultfd::try_from(fd).unwrap();
    let read = in_thread(move || adopted.read_events(&mut EventBuffer::new(4)).map(|events| events.len()));
    assert_eq!(read.recv_timeout(LIMIT).expect("the read waits").unwrap(), 0);
}

#[test]
fn a_minor_fault_is_resolved_with_what_the_memfd_holds() {
    let Some(uffd) = uffd(Features::MINOR_SHMEM) else { return };
    let memfd = Memfd::create("plimsoll-test", ByteCount(PAGE)).unwrap();
    let writer = SharedMapping::new(&memfd).unwrap();
    writer.as_atomic_u64s()[3].store(11, Ordering::Relaxed);
    let reader = Arc::new(SharedMapping::new(&memfd).unwrap());
    let range = HvaRange::new(reader.base(), reader.size()).unwrap();
    // SAFETY: a `SharedMapping` hands out references to atomics only, and this one lives to the end of the test.
    #[expect(unsafe_code, reason = "registers a mapping that lends atomics")]
    let unborrowed = unsafe { UnborrowedRange::assume(range) };
    uffd.register(unborrowed, RegisterMode::MINOR).unwrap();
    let touching = Arc::clone(&reader);
    let value = in_thread(move || touching.as_atomic_u64s()[3].load(Ordering::Relaxed));
    match next_event(&uffd) {
        Event::PageFault { kind, .. } => assert_eq!(kind, FaultKind::Minor),
        other => panic!("{other:?}"),
    }
    assert_eq!(done(uffd.continue_(range, Wake::Yes)), 1);
    assert_eq!(value.recv_timeout(LIMIT).unwrap(), 11);
}

#[test]
fn unmapping_is_reported_and_waits_for_its_reader() {
    let Some(uffd) = uffd(Features::EVENT_UNMAP) else { return };
    let memory = AnonymousMapping::new(ByteCount(PAGE), HugePages::Never).unwrap();
    let range = memory.range();
    register(&uffd, &memory, RegisterMode::MISSING);
    let dropped = in_thread(move || drop(memory));
    match next_event(&uffd) {
        Event::Unmap { start, end } => assert_eq!((start, end), (range.start(), range.end())),
        other => panic!("{other:?}"),
    }
    dropped.recv_timeout(LIMIT).unwrap();
    assert_eq!(uffd.copy(range.start(), &[1; PAGE_SIZE], Wake::Yes).stop, Some(Stop::NotMapped));
}

#[test]
fn memory_of_a_process_that_has_ended_says_so() {
    const ROLE: &str = "PLIMSOLL_SYS_TEST_UFFD_SOCKET";
    const NAME: &str = "memory_of_a_process_that_has_ended_says_so";
    use plimsoll_sys::fdpass;
    use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
    if let Ok(number) = std::env::var(ROLE) {
        let Some(uffd) = uffd(Features::MOVE) else { return };
        let memory = map(2);
        register(&uffd, &memory, RegisterMode::MISSING);
        // SAFETY: the parent made this descriptor inheritable for this child, and it stays open to the end.
        #[expect(unsafe_code, reason = "a descriptor that was named in the environment")]
        let socket = unsafe { BorrowedFd::borrow_raw(number.parse().unwrap()) };
        fdpass::send(socket, &memory.base().0.to_ne_bytes(), &[uffd.as_fd()]).unwrap();
        let value = memory.read_u64(ByteCount(0)).unwrap();
        fdpass::send(socket, &value.to_ne_bytes(), &[]).unwrap();
        return;
    }
    let (ours, theirs) = fdpass::seqpacket_pair().unwrap();
    plimsoll_sys::process::make_inheritable(&theirs).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME])
        .env(ROLE, theirs.as_raw_fd().to_string())
        .spawn()
        .unwrap();
    drop(theirs);
    let mut word = [0; 8];
    let Some(received) = fdpass::recv(&ours, &mut word, 1).unwrap() else {
        child.wait().unwrap();
        println!("SKIPPED: no right to a userfaultfd");
        return;
    };
    let theirs = Userfaultfd::try_from(received.descriptors.into_iter().next().unwrap()).unwrap();
    let base = Hva(u64::from_ne_bytes(word));
    assert!(matches!(next_event(&theirs), Event::PageFault { .. }));
    // Pages of another process can be installed from here, and not moved.
    let mine = map(1);
    mine.write_u64(ByteCount(0), 1).unwrap();
    let moved = theirs.move_pages(base, mine.unborrowed(mine.range()).unwrap(), MOVE_ALL);
    assert_eq!(moved, Outcome { done: ByteCount(0), stop: Some(Stop::Invalid) });
    assert_eq!(done(theirs.copy(base, &[3; PAGE_SIZE], Wake::Yes)), 1);
    fdpass::recv(&ours, &mut word, 0).unwrap().unwrap();
    assert_eq!(word, [3; 8]);
    child.wait().unwrap();
    let gone = theirs.copy(Hva(base.0 + PAGE), &[3; PAGE_SIZE], Wake::Yes);
    assert_eq!(gone, Outcome { done: ByteCount(0), stop: Some(Stop::NoProcess) });
}

/// Undoes what keeps an `AnonymousMapping` out of children.
fn let_into_children(memory: &AnonymousMapping) {
    let start = std::ptr::without_provenance_mut(usize::try_from(memory.base().0).unwrap());
    let len = usize::try_from(memory.len().0).unwrap();
    // SAFETY: the advice concerns children only.
    #[expect(unsafe_code, reason = "undoes MADV_DONTFORK")]
    unsafe {
        rustix::mm::madvise(start, len, rustix::mm::Advice::LinuxDoFork).unwrap();
    }
}

/// Runs a program in a child that is forked, with a copy of all page tables, and not vforked.
fn fork_a_child() {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new("true");
    // SAFETY: the closure does nothing. That there is one makes the standard library fork.
    #[expect(unsafe_code, reason = "forces a fork")]
    unsafe {
        command.pre_exec(|| Ok(()));
    }
    assert!(command.status().unwrap().success());
}

#[test]
fn a_fork_is_reported_with_the_childs_userfaultfd() {
    let Some(uffd) = uffd(Features::EVENT_FORK) else { return };
    let memory = map(1);
    let_into_children(&memory);
    register(&uffd, &memory, RegisterMode::MISSING);
    let forked = in_thread(fork_a_child);
    match next_event(&uffd) {
        Event::Fork { uffd } => drop(Userfaultfd::try_from(uffd).unwrap()),
        other => panic!("{other:?}"),
    }
    // Forks of other tests are reported here as well and would wait: end that before awaiting our own.
    drop(uffd);
    forked.recv_timeout(LIMIT).unwrap();
}

#[test]
fn a_user_mode_descriptor_lets_the_kernel_fail_instead_of_wait() {
    let uffd = Userfaultfd::open(Mode::UserOnly).unwrap();
    uffd.handshake(Features::empty()).unwrap();
    let memory = map(1);
    register(&uffd, &memory, RegisterMode::MISSING);
    let base = memory.base();
    let read = in_thread(move || process_memory::read(ProcessId::own(), base, &mut [0; 8]));
    assert_eq!(read.recv_timeout(LIMIT).unwrap().stop, Some(Refusal::NotMapped));
}

#[test]
fn a_page_once_shared_with_a_child_is_busy_until_it_is_populated_again() {
    let Some(uffd) = uffd(Features::MOVE) else { return };
    let (source, target) = (map(1), map(1));
    register(&uffd, &target, RegisterMode::MISSING);
    source.write_u64(ByteCount(0), 5).unwrap();
    let_into_children(&source);
    fork_a_child();
    let page = source.unborrowed(source.range()).unwrap();
    let busy = uffd.move_pages(target.base(), page, MOVE_ALL);
    assert_eq!(busy, Outcome { done: ByteCount(0), stop: Some(Stop::Busy) });
    source.populate_write(source.range()).unwrap();
    assert_eq!(done(uffd.move_pages(target.base(), page, MOVE_ALL)), 1);
    assert_eq!(target.read_u64(ByteCount(0)).unwrap(), 5);
}

#[test]
fn without_the_capability_the_device_gives_a_descriptor() {
    use plimsoll_sys::process::CapabilitySet;
    if !rustix::process::geteuid().is_root() || !std::path::Path::new("/dev/userfaultfd").exists() {
        println!("SKIPPED: needs root and /dev/userfaultfd");
        return;
    }
    // Capabilities belong to a thread, and this one ends with the test.
    let opened = in_thread(|| {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::SYS_PTRACE);
        rustix::thread::set_capabilities(None, sets).unwrap();
        let uffd = Userfaultfd::open(Mode::KernelAndUser).unwrap();
        let forks = uffd.handshake(Features::EVENT_FORK).unwrap_err();
        assert!(matches!(forks, HandshakeError::NotPermitted), "{forks}");
        uffd.handshake(Features::MOVE).unwrap();
        uffd
    });
    let uffd = opened.recv_timeout(LIMIT).expect("the thread panicked");
    let memory = map(1);
    register(&uffd, &memory, RegisterMode::MISSING);
    assert_eq!(done(uffd.zeropage(memory.range(), Wake::Yes)), 1);
}
