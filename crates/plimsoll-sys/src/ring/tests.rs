use super::*;
use crate::blocks::BLOCK_SIZE;
use io_uring::types::Fd;
use rustix::fs::{MemfdFlags, memfd_create};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};

const NUMBER: u64 = 77;

/// A file of which each byte says which block it is in.
fn file(blocks: u8) -> OwnedFd {
    let file = memfd_create("test-ring", MemfdFlags::CLOEXEC).unwrap();
    for block in 0..blocks {
        let written = rustix::io::pwrite(&file, &[block; BLOCK_SIZE], u64::from(block) * BLOCK_SIZE as u64);
        assert_eq!(written.unwrap(), BLOCK_SIZE);
    }
    file
}

fn read(ticket: u64, offset: u64, blocks: usize) -> Read {
    Read { ticket, offset, blocks: Blocks::new(blocks), done: 0 }
}

fn until_ended(ring: &mut ReadRing, reads: usize) -> Vec<Ended> {
    let mut ended = Vec::new();
    while ended.len() < reads {
        ring.wait(&mut ended).unwrap();
    }
    ended
}

#[test]
fn reads_that_are_under_way_together_each_fill_their_own_memory() {
    let (mut ring, file) = (ReadRing::new(4).unwrap(), file(6));
    ring.set_file(Some(file.as_fd())).unwrap();
    for ticket in 0..4 {
        assert!(ring.begin(read(ticket, ticket * BLOCK_SIZE as u64, 1)).is_ok());
    }
    assert_eq!((ring.depth(), ring.under_way()), (4, 4));
    let refused = ring.begin(read(9, 0, 1)).err().map(|read| read.ticket);
    assert_eq!(refused, Some(9), "it is full");
    let ended = until_ended(&mut ring, 4);
    let came: BTreeMap<u64, usize> =
        ended.iter().map(|it| (it.read.ticket, *it.outcome.as_ref().unwrap())).collect();
    assert_eq!(came, (0..4).map(|ticket| (ticket, BLOCK_SIZE)).collect());
    for Ended { read, .. } in ended {
        assert!(read.blocks.bytes().iter().all(|byte| u64::from(*byte) == read.ticket));
    }
    // Behind what is there already, and behind the end of the file.
    assert!(ring.begin(Read { done: BLOCK_SIZE, ..read(5, 4 * BLOCK_SIZE as u64, 3) }).is_ok());
    assert!(ring.begin(read(6, 60 * BLOCK_SIZE as u64, 1)).is_ok());
    for Ended { read, outcome } in until_ended(&mut ring, 2) {
        match read.ticket {
            5 => {
                assert_eq!(outcome.unwrap(), BLOCK_SIZE);
                let blocks: Vec<u8> = read.blocks.bytes().iter().step_by(BLOCK_SIZE).copied().collect();
                assert_eq!(blocks, [0, 5, 0]);
            }
            ticket => assert_eq!((ticket, outcome.unwrap()), (6, 0)),
        }
    }
}

#[test]
fn a_bell_that_was_rung_before_or_while_somebody_waits_wakes_them_with_nothing() {
    let mut ring = ReadRing::new(2).unwrap();
    let mut ended = Vec::new();
    ring.bell().ring().unwrap();
    ring.wait(&mut ended).unwrap();
    let bell = Arc::clone(ring.bell());
    std::thread::scope(|scope| {
        scope.spawn(move || bell.ring().unwrap());
        ring.wait(&mut ended).unwrap();
    });
    assert!(ended.is_empty());
}

#[test]
fn a_ring_without_a_file_says_so_of_each_read() {
    let (mut ring, file) = (ReadRing::new(2).unwrap(), file(1));
    for is_there in [false, true, false] {
        ring.set_file(is_there.then_some(file.as_fd())).unwrap();
        assert!(ring.begin(read(1, 0, 1)).is_ok());
        let outcome = until_ended(&mut ring, 1).pop().unwrap().outcome;
        let said = outcome.map_err(|error| Errno::from_io_error(&error));
        assert_eq!(said, if is_there { Ok(BLOCK_SIZE) } else { Err(Some(Errno::BADF)) });
    }
}

/// What the kernel says of an entry.
fn said_of(ring: &mut ReadRing, entry: io_uring::squeue::Entry) -> Option<Errno> {
    // SAFETY: Whatever the entry would have the kernel write to is a static or on the caller's stack until it has ended.
    unsafe { ring.ring.submission().push(&entry.user_data(NUMBER)) }.unwrap();
    ring.ring.submit_and_wait(1).unwrap();
    let entry = ring.ring.completion().next().unwrap();
    assert_eq!(entry.user_data(), NUMBER);
    (entry.result() < 0).then(|| Errno::from_raw_os_error(-entry.result()))
}

#[test]
fn a_ring_opens_writes_and_registers_nothing_and_reads_nothing_but_its_files() {
    let (mut ring, file) = (ReadRing::new(2).unwrap(), file(1));
    ring.set_file(Some(file.as_fd())).unwrap();
    let (mut into, from) = ([0; BLOCK_SIZE], [1; BLOCK_SIZE]);
    let length = u32::try_from(BLOCK_SIZE).unwrap();
    let own = Fd(file.as_raw_fd());
    let refused = [
        opcode::OpenAt::new(Fd(libc::AT_FDCWD), c"/etc/hostname".as_ptr()).build(),
        opcode::Write::new(Fixed(FILE), from.as_ptr(), length).build(),
        opcode::Read::new(own, into.as_mut_ptr(), length).build(),
        opcode::Nop::new().build().flags(Flags::FIXED_FILE),
        opcode::Close::new(own).build(),
        opcode::Read::new(Fixed(FILE), into.as_mut_ptr(), length).build().flags(Flags::ASYNC),
    ];
    for (which, entry) in refused.into_iter().enumerate() {
        assert_eq!(said_of(&mut ring, entry), Some(Errno::ACCESS), "entry {which}");
    }
    let submitter = ring.ring.submitter();
    let registrations = [
        submitter.register_eventfd(ring.bell.as_fd().as_raw_fd()),
        submitter.unregister_files(),
        submitter.register_buffers_sparse(1),
        submitter.register_restrictions(&mut [Restriction::sqe_op(opcode::OpenAt::CODE)]),
        submitter.register_personality().map(drop),
    ];
    for refused in registrations {
        assert_eq!(Errno::from_io_error(&refused.unwrap_err()), Some(Errno::ACCESS));
    }
    let allowed = opcode::Read::new(Fixed(FILE), into.as_mut_ptr(), length).build();
    assert_eq!(said_of(&mut ring, allowed), None);
}

#[test]
fn what_never_ends_keeps_its_memory_for_good_and_whoever_drops_the_ring_goes_on() {
    let mut ring = ReadRing::new(2).unwrap();
    // Whose other end nobody writes to.
    let (from, to) = rustix::pipe::pipe().unwrap();
    ring.set_file(Some(from.as_fd())).unwrap();
    assert!(ring.begin(read(1, 0, 1)).is_ok());
    ring.bell().ring().unwrap();
    let mut ended = Vec::new();
    ring.wait(&mut ended).unwrap();
    assert!(ended.is_empty() && ring.under_way() == 1);
    ring.set_patience(Duration::ZERO);
    drop(ring);
    // The kernel has given the read up, or goes on with it in memory that is nobody's.
    rustix::io::write(&to, &[1; 8]).unwrap();
}

#[test]
fn a_ring_that_is_dropped_waits_for_what_is_under_way() {
    let mut ring = ReadRing::new(2).unwrap();
    let (from, to) = rustix::pipe::pipe().unwrap();
    ring.set_file(Some(from.as_fd())).unwrap();
    assert!(ring.begin(read(1, 0, 1)).is_ok());
    ring.set_patience(Duration::from_secs(600));
    std::thread::scope(|scope| {
        let dropped = scope.spawn(move || drop(ring));
        rustix::io::write(&to, &[1; 8]).unwrap();
        dropped.join().unwrap();
    });
    let mut rest = [0; 8];
    let flags = rustix::fs::OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(&from, flags).unwrap();
    assert_eq!(rustix::io::read(&from, &mut rest), Err(Errno::AGAIN), "the read has taken it");
}

static CAUGHT: AtomicU32 = AtomicU32::new(0);

extern "C" fn catch(_: libc::c_int) {
    CAUGHT.fetch_add(1, Ordering::Relaxed);
}

/// Has a thread interrupted, and comes back when it was.
fn interrupt(thread: libc::pthread_t) {
    let (before, begun) = (CAUGHT.load(Ordering::Relaxed), Instant::now());
    // SAFETY: The thread waits for what its caller has not written yet, so there is one.
    assert_eq!(unsafe { libc::pthread_kill(thread, libc::SIGUSR1) }, 0);
    while CAUGHT.load(Ordering::Relaxed) == before {
        assert!(begun.elapsed() < Duration::from_secs(120), "it does not catch the signal");
        std::thread::yield_now();
    }
}

#[test]
fn who_waits_may_be_interrupted_again_and_again_and_each_read_fills_its_memory_once() {
    // As many blocks as a pipe has room for, so that nobody waits for a test that has failed.
    const ROUNDS: u8 = 8;
    // SAFETY: All that the handler does is to add to a number, which it may do at any time.
    let before = unsafe { libc::signal(libc::SIGUSR1, catch as *const () as libc::sighandler_t) };
    assert_ne!(before, libc::SIG_ERR);
    // Of a pipe a read stays under way until somebody writes.
    let (from, into) = rustix::pipe::pipe().unwrap();
    let mut ring = ReadRing::new(2).unwrap();
    ring.set_file(Some(from.as_fd())).unwrap();
    // SAFETY: There is nothing to it.
    let waiting = unsafe { libc::pthread_self() };
    let (mut came, mut vain) = (Vec::new(), 0);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for round in 0..ROUNDS {
                for byte in [2 * round, 2 * round + 1] {
                    (0..20).for_each(|_| interrupt(waiting));
                    // No more than a pipe takes as a whole.
                    assert_eq!(rustix::io::write(&into, &[byte; BLOCK_SIZE]), Ok(BLOCK_SIZE));
                }
            }
        });
        for round in 0..u64::from(ROUNDS) {
            assert!((0..2).all(|read_of| ring.begin(read(2 * round + read_of, 0, 1)).is_ok()));
            let mut ended = Vec::new();
            while ended.len() < 2 {
                let before = ended.len();
                ring.wait(&mut ended).unwrap();
                vain += usize::from(ended.len() == before);
            }
            for Ended { read, outcome } in ended {
                let bytes = read.blocks.bytes();
                assert_eq!(outcome.unwrap(), BLOCK_SIZE);
                assert!(bytes.iter().all(|byte| *byte == bytes[0]));
                came.push((bytes[0], read.ticket));
            }
        }
    });
    came.sort_unstable();
    assert!(came.iter().map(|(byte, _)| *byte).eq(0..2 * ROUNDS), "{came:?}");
    let tickets: BTreeSet<u64> = came.iter().map(|(_, ticket)| *ticket).collect();
    assert_eq!(tickets.len(), came.len());
    assert!(vain > 0, "it was interrupted at nothing");
}
