//! The store of a supervisor that listens when the test says so, and keepers that die meanwhile.
//!
//! Enters: what the shipped keeper sends. Leaves: what the next keeper would find. The supervisor does what systemd does: it keeps
//! several under one name, drops a descriptor of the same file as one that it has, and removes all of a name.
use super::{
    BOARD, Board, GO, GOOD, PATIENCE, RESERVED, die, end, held, keeper_of, label, labelled, rests, slots,
    until,
};
use plimsoll_host::keeper::client::Client;
use plimsoll_host::keeper::serve::Keeper;
use plimsoll_host::keeper::store::{Adopted, GENERATIONS, Store, Stored, adopt};
use plimsoll_linux::uffd::estate::Keep;
use plimsoll_sys::fdpass;
use rustix::fs::fstat;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use tempfile::TempDir;

const FIRST: u32 = RESERVED;
const SECOND: u32 = RESERVED + 1;

/// Keeps what it is sent, when it listens.
struct Supervisor {
    socket: UnixDatagram,
    place: PathBuf,
    _folder: TempDir,
    has: Vec<(String, OwnedFd)>,
    /// What it forgets to do.
    loses: Option<&'static str>,
}

impl Supervisor {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("notify");
        let socket = UnixDatagram::bind(&place).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { socket, place, _folder: folder, has: Vec::new(), loses: None }
    }

    /// A keeper that begins with what was adopted.
    fn keeper(&self, Adopted { mut slots, stale }: Adopted, conduct: &str) -> Keeper {
        let store = Store::new(self.place.as_os_str(), &mut slots, stale, None).unwrap();
        let mut keeper = keeper_of(slots, conduct, PATIENCE);
        keeper.store_in(store);
        keeper
    }

    /// Has the kernel refuse everything until it listens.
    fn is_busy(&self) {
        let other = UnixDatagram::unbound().unwrap();
        other.set_nonblocking(true).unwrap();
        while other.send_to(b"STATUS=busy", &self.place).is_ok() {}
    }

    /// Takes what it was sent.
    fn listens(&mut self) {
        let mut bytes = [0; 200];
        while let Ok(Some(received)) = fdpass::recv(&self.socket, &mut bytes, 1) {
            let text = str::from_utf8(&bytes[..received.bytes]).unwrap();
            if self.loses.is_some_and(|lost| text.starts_with(lost)) {
                continue;
            }
            let Some(name) = text.lines().find_map(|line| line.strip_prefix("FDNAME=")) else { continue };
            match received.descriptors.into_iter().next() {
                Some(descriptor) => {
                    assert!(text.starts_with("FDSTORE=1") && text.ends_with("FDPOLL=0"), "{text}");
                    let file = |fd: &OwnedFd| fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).unwrap();
                    if self.has.iter().all(|(_, other)| file(other) != file(&descriptor)) {
                        self.has.insert(0, (name.to_owned(), descriptor));
                    }
                }
                None => self.has.retain(|(other, _)| other != name),
            }
        }
    }

    /// The names of machines' slots that it has.
    fn names(&self) -> Vec<&str> {
        let is_machines = |name: &&str| Stored::named(name).is_some_and(|stored| stored.slot >= RESERVED);
        let mut names: Vec<&str> = self.has.iter().map(|(name, _)| &**name).filter(is_machines).collect();
        names.sort_unstable();
        names
    }

    /// What the next keeper finds.
    fn hands_on(&self) -> Adopted {
        let copy = |(name, fd): &(String, OwnedFd)| (Stored::named(name).unwrap(), fd.try_clone().unwrap());
        adopt(self.has.iter().map(copy).collect(), 512).unwrap().unwrap()
    }
}

/// A keeper of managers of that conduct, and a supervisor that keeps what it has.
fn supervised_keeper(conduct: &str) -> (Supervisor, Keeper, Board) {
    let (supervisor, (slots, board)) = (Supervisor::new(), slots());
    let keeper = supervisor.keeper(Adopted { slots, stale: Vec::new() }, conduct);
    (supervisor, keeper, board)
}

/// The same, once its manager has had something kept and waits for [`GO`].
fn has_kept_one(conduct: &str) -> (Supervisor, Keeper, Board) {
    let (mut supervisor, mut keeper, board) = supervised_keeper(conduct);
    until(&mut keeper, |_| {
        supervisor.listens();
        board.get(GOOD) == 1
    });
    (supervisor, keeper, board)
}

fn adopted_label(adopted: &Adopted, slot: u32) -> Option<u64> {
    adopted.slots.get(slot).map(|held| label(held.try_clone_to_owned().unwrap()))
}

// The roles.

/// Has a slot hold something, and when it may something else.
pub(super) fn refills(keeper: &Client, board: &Board) -> ! {
    keeper.keep(FIRST, labelled(1).as_fd()).unwrap();
    board.set(GOOD, 1);
    board.wait_for_go(1);
    keeper.let_go(FIRST).unwrap();
    let kept = keeper.keep(FIRST, labelled(2).as_fd());
    board.set(GOOD, if kept.is_ok() { 2 } else { 3 });
    rests()
}

/// Has one slot hold something, and when it may another, before it.
pub(super) fn moves_one(keeper: &Client, board: &Board) -> ! {
    let one = labelled(1);
    keeper.keep(SECOND, one.as_fd()).unwrap();
    board.set(GOOD, 1);
    board.wait_for_go(1);
    keeper.let_go(SECOND).unwrap();
    keeper.keep(FIRST, one.as_fd()).unwrap();
    board.set(GOOD, 2);
    rests()
}

// The tests.

pub(super) fn supervised() {
    let (supervisor, mut keeper, board) = supervised_keeper("gives-many");
    let counted = allocation_counter::measure(|| {
        until(&mut keeper, |_| {
            while supervisor.socket.recv(&mut [0; 200]).is_ok() {}
            board.get(GOOD) >= 2
        });
    });
    assert_eq!((counted.count_total, counted.bytes_total), (0, 0));
    end(keeper);
    let (mut supervisor, mut keeper, board) = supervised_keeper("gives");
    until(&mut keeper, |_| {
        supervisor.listens();
        board.get(GOOD) >= 2 && supervisor.names() == ["slot-10", "slot-8"]
    });
    end(keeper);
}

pub(super) fn comes_back_empty() {
    let (mut supervisor, mut keeper, board) = has_kept_one("refills");
    supervisor.is_busy();
    board.set(GO, 1);
    until(&mut keeper, |keeper| held(keeper, FIRST) == Some(3));
    assert_eq!(board.get(GOOD), 1, "what is not stored is said to be kept");
    die(keeper);
    supervisor.listens();
    assert_eq!(supervisor.names(), ["slot-8"]);
    let adopted = supervisor.hands_on();
    assert_eq!(adopted_label(&adopted, FIRST), None, "another's is in the slot");
    assert_eq!(adopted.stale, [Stored { slot: FIRST, generation: 0 }]);
    assert!([BOARD, GENERATIONS].into_iter().all(|slot| adopted.slots.get(slot).is_some()));
    let mut keeper = supervisor.keeper(adopted, "hangs");
    until(&mut keeper, |_| {
        supervisor.listens();
        supervisor.names().is_empty()
    });
    end(keeper);
}

pub(super) fn is_told() {
    let (mut supervisor, mut keeper, board) = has_kept_one("refills");
    supervisor.is_busy();
    board.set(GO, 1);
    until(&mut keeper, |keeper| held(keeper, FIRST) == Some(3));
    until(&mut keeper, |_| {
        supervisor.listens();
        board.get(GOOD) == 2
    });
    supervisor.listens();
    assert_eq!(supervisor.names(), ["slot-8-1"]);
    die(keeper);
    assert_eq!(adopted_label(&supervisor.hands_on(), FIRST), Some(3));

    let (mut supervisor, mut keeper, board) = has_kept_one("refills");
    supervisor.is_busy();
    board.set(GO, 1);
    until(&mut keeper, |_| board.get(GOOD) == 3);
    assert_eq!(held(&keeper, FIRST), None, "it is kept although its manager was told otherwise");
    until(&mut keeper, |_| {
        supervisor.listens();
        supervisor.names().is_empty()
    });
    die(keeper);
}

pub(super) fn two_of_one_slot() {
    let (mut supervisor, mut keeper, board) = has_kept_one("refills");
    supervisor.loses = Some("FDSTOREREMOVE");
    board.set(GO, 1);
    until(&mut keeper, |_| {
        supervisor.listens();
        board.get(GOOD) == 2
    });
    die(keeper);
    assert_eq!(supervisor.names(), ["slot-8", "slot-8-1"]);
    let stale = [Stored { slot: FIRST, generation: 0 }];
    let adopted = supervisor.hands_on();
    assert_eq!((adopted_label(&adopted, FIRST), &adopted.stale[..]), (Some(3), &stale[..]));
    drop(adopted);
    // Where not even the generations come back, the newest is it.
    supervisor.has.retain(|(name, _)| *name != format!("slot-{GENERATIONS}"));
    let adopted = supervisor.hands_on();
    assert_eq!((adopted_label(&adopted, FIRST), &adopted.stale[..]), (Some(3), &stale[..]));
}

pub(super) fn moves() {
    let (mut supervisor, mut keeper, board) = has_kept_one("moves");
    assert_eq!(supervisor.names(), ["slot-9"]);
    supervisor.is_busy();
    board.set(GO, 1);
    until(&mut keeper, |keeper| held(keeper, FIRST) == Some(2));
    until(&mut keeper, |_| {
        supervisor.listens();
        board.get(GOOD) == 2
    });
    die(keeper);
    supervisor.listens();
    assert_eq!(supervisor.names(), ["slot-8"]);
    assert_eq!(adopted_label(&supervisor.hands_on(), FIRST), Some(2));
}
