//! A VMM that hands real memory over and then breaks the protocol, in a process of its own.
//!
//! Enters: a [`Conduct`] and the hand-over socket. Leaves: whatever that conduct says, on a socket and with
//! userfaultfds that are what an honest VMM's are. It lives until its standard input closes.
pub(crate) use crate::goods::{Goods, RAM, RAM_FEATURES};
use plimsoll_core::word::Gift;
use plimsoll_linux::uffd::wire::{self, Item, Op, Outcome, Stop, Ticket, Welcome};
use plimsoll_sys::HvaRange;
use plimsoll_sys::fdpass;
use plimsoll_sys::process::adopt_inherited;
use plimsoll_sys::uffd::RegisterMode;
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE, PageCount};
use rustix::net::Shutdown;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;

/// The first argument of a process that is to be one.
pub(crate) const ROLE: &str = "be-an-impostor";

/// How it answers its first request to move pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Conduct {
    /// Bytes without a meaning.
    Nonsense,
    /// A single byte.
    OneByte,
    /// An operation that does not exist.
    UnknownOp,
    /// A reason that does not exist.
    UnknownStop,
    /// More pages than were asked for.
    Overdone,
    /// Fewer pages, and no reason.
    Unexplained,
    /// That no page at all was given back, in some way.
    TellsOfNone,
    /// The answer to another question.
    OutOfStep,
    /// The answer of a later epoch.
    LaterEpoch,
    /// One outcome too few.
    Short,
    /// More items than there are in any request.
    TooMany,
    /// That the airlock's pages are taken.
    Occupied,
    /// That everything was moved; nothing was.
    Lies,
    /// By closing the socket.
    Closes,
    /// Never.
    Silent,
}

impl Conduct {
    pub(crate) const ALL: [Self; 15] = [
        Self::Nonsense,
        Self::OneByte,
        Self::UnknownOp,
        Self::UnknownStop,
        Self::Overdone,
        Self::Unexplained,
        Self::TellsOfNone,
        Self::OutOfStep,
        Self::LaterEpoch,
        Self::Short,
        Self::TooMany,
        Self::Occupied,
        Self::Lies,
        Self::Closes,
        Self::Silent,
    ];

    pub(crate) fn name(self) -> String {
        format!("{self:?}")
    }
}

impl Goods {
    /// Does what an honest agent does about the registration of guest pages, and nothing else.
    fn oblige(&self, op: Op, item: &Item) {
        let bytes = |pages: u32| PageCount(u64::from(pages)).bytes();
        let start = Hva(self.memory.base().0 + bytes(item.page().0).0);
        let range = HvaRange::new(start, bytes(item.pages)).unwrap();
        match op {
            Op::Watch => {
                let memory = self.memory.unborrowed(range).unwrap();
                self.ram.register(memory, RegisterMode::MISSING).map(drop).unwrap();
            }
            Op::Unwatch => self.ram.unregister(range).unwrap(),
            _ => {}
        }
    }
}

pub(crate) fn child(conduct: &str, handover: i32) -> ExitCode {
    let conduct = Conduct::ALL.into_iter().find(|known| known.name() == conduct).unwrap();
    let socket = adopt_inherited(handover).unwrap();
    let goods = Goods::new(&conduct.name());
    fdpass::send(&socket, &goods.hello.encode(), &[goods.ram.as_fd(), goods.airlock.as_fd()]).unwrap();
    let mut bytes = [0; wire::DATAGRAM_MAX];
    let received = fdpass::recv(&socket, &mut bytes, 0).unwrap().unwrap();
    assert!(matches!(Welcome::decode(&bytes[..received.bytes]).unwrap(), Welcome::Accepted { .. }));
    let goods = Arc::new(goods);
    let filled = Arc::clone(&goods);
    std::thread::spawn(move || {
        for page in 0..RAM.0 / PAGE_SIZE as u64 {
            filled.memory.write_u64(ByteCount(page * PAGE_SIZE as u64), page + 1).unwrap();
        }
    });
    misbehave(conduct, socket, &goods);
    let _ = std::io::stdin().read(&mut [0]);
    // Unmapping would wait for the manager to read of it.
    std::process::exit(0)
}

fn misbehave(conduct: Conduct, socket: OwnedFd, goods: &Goods) {
    let mut bytes = [0; wire::DATAGRAM_MAX];
    loop {
        let Ok(Some(received)) = fdpass::recv(&socket, &mut bytes, 0) else { return };
        let (ticket, items) = wire::decode_request(&bytes[..received.bytes]).unwrap();
        match (conduct, ticket.op) {
            // The number it was inherited as is open, too.
            (Conduct::Closes, Op::MoveOut) => return rustix::net::shutdown(&socket, Shutdown::Both).unwrap(),
            // Kept open to the end of the process.
            (Conduct::Silent, Op::MoveOut) => return std::mem::forget(socket),
            (_, Op::MoveOut) => drop(fdpass::send(&socket, &answer(conduct, ticket, &items), &[])),
            (_, op) => {
                items.iter().for_each(|item| goods.oblige(op, item));
                drop(fdpass::send(&socket, &reply(ticket, &done(&items)), &[]));
            }
        }
    }
}

fn done(items: &[Item]) -> Vec<Outcome> {
    items.iter().map(|item| Outcome { done: item.pages, stop: None }).collect()
}

fn reply(ticket: Ticket, outcomes: &[Outcome]) -> Vec<u8> {
    let mut bytes = Vec::new();
    wire::encode_reply(&mut bytes, ticket, outcomes);
    bytes
}

/// What the conduct makes of an honest answer. Offsets are those of the table in `plimsoll_linux::uffd::wire`.
fn answer(conduct: Conduct, ticket: Ticket, items: &[Item]) -> Vec<u8> {
    let mut outcomes = done(items);
    let mut bytes = reply(ticket, &outcomes);
    match conduct {
        Conduct::Nonsense => bytes = vec![0xa5; 333],
        Conduct::OneByte => bytes.truncate(1),
        Conduct::UnknownOp => bytes[12..16].copy_from_slice(&99u32.to_le_bytes()),
        Conduct::UnknownStop => bytes[28..30].copy_from_slice(&77u16.to_le_bytes()),
        Conduct::Overdone => outcomes[0].done += 1,
        Conduct::Unexplained => outcomes[0].done -= 1,
        Conduct::TellsOfNone => {
            outcomes[0] = Outcome { done: 0, stop: Some(Stop::Given { gift: Gift::Ballooned, pages: 0 }) };
        }
        Conduct::Occupied => outcomes.iter_mut().for_each(|outcome| {
            *outcome = Outcome { done: 0, stop: Some(Stop::Exists) };
        }),
        Conduct::OutOfStep => return reply(Ticket { sequence: ticket.sequence + 41, ..ticket }, &outcomes),
        Conduct::LaterEpoch => return reply(Ticket { epoch: ticket.epoch + 1, ..ticket }, &outcomes),
        Conduct::Short => drop(outcomes.pop()),
        Conduct::TooMany => bytes[16..20].copy_from_slice(&u32::MAX.to_le_bytes()),
        Conduct::Lies | Conduct::Closes | Conduct::Silent => {}
    }
    if outcomes == done(items) { bytes } else { reply(ticket, &outcomes) }
}

/// Where the layout's only region would lie in nobody's memory.
pub(crate) const NOWHERE: Hva = Hva(0x10_0000_0000);
