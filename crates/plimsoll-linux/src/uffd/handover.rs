//! Taking a machine, all of its shards or none, from its VMM.
//!
//! Enters: the socket of a VMM that may be hostile. Leaves: a [`Custody`] for each shard, of which it has been checked
//! that together they are one machine, and the sockets that its agents are to serve; or a refusal, of which the VMM is
//! told, and nothing. The messages are those of [`wire`].
use super::linux_space::{Custody, is_readable};
use super::wire::{self, DATAGRAM_MAX, Hello, Welcome, WireError};
use crate::explain;
use plimsoll_core::layout::GuestLayout;
use plimsoll_sys::fdpass::{self, RecvError, SendError};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::uffd::{self, Userfaultfd};
use plimsoll_types::{ByteCount, Hva, MachineId};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// A machine could not be taken over from its VMM.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HandoverError {
    /// The VMM closed the socket first.
    #[error("the VMM closed the hand-over socket before it handed anything over")]
    Closed,
    /// Nothing came in time.
    #[error("the VMM handed nothing over within {seconds} s")]
    Silent {
        /// How long it was waited for.
        seconds: u64,
    },
    /// Receiving failed.
    #[error("the hand-over could not be received")]
    Receive(#[from] RecvError),
    /// Answering failed.
    #[error("the hand-over could not be answered")]
    Send(#[from] SendError),
    /// What came is not acceptable.
    #[error("the VMM's hand-over is not acceptable")]
    Wire(#[from] WireError),
    /// A descriptor is not what it should be.
    #[error("the VMM's hand-over is not acceptable")]
    Descriptor(#[from] uffd::AdoptError),
    /// Waiting failed.
    #[error("waiting for the hand-over failed")]
    Poll(#[source] io::Error),
    /// The further shards' sockets could not be made.
    #[error("no socket for a shard of the machine")]
    Socket(#[source] io::Error),
}

/// A machine that has been handed over and waits for the answer.
#[derive(Debug)]
pub struct Handover {
    /// Its shards, in the order of their guest addresses.
    pub shards: Vec<Arc<Custody>>,
    /// The agents' ends of all sockets but the first.
    sockets: Vec<OwnedFd>,
}

impl Handover {
    /// Receives what the VMM `process` hands over on a `SOCK_SEQPACKET` socket, for which it may take as long as
    /// `patience`. Follow with [`accept`](Self::accept) or [`refuse`](Self::refuse).
    ///
    /// # Errors
    /// [`HandoverError`]; what came is closed, and the VMM is told why and sees the socket close.
    pub fn receive(socket: OwnedFd, process: Pidfd, patience: Duration) -> Result<Self, HandoverError> {
        let until = Instant::now() + patience;
        let received = receive_all(&socket, || {
            let left = until.saturating_duration_since(Instant::now());
            if is_readable(socket.as_fd(), left).map_err(HandoverError::Poll)? {
                return Ok(());
            }
            Err(HandoverError::Silent { seconds: patience.as_secs() })
        });
        if let Err(error) = &received {
            // Best effort: a VMM that does not listen learns it from the socket's end.
            let reason = explain(error);
            let _ = fdpass::send(&socket, &Welcome::Refused { reason }.encode(), &[]);
        }
        let (received, further) = received?;
        let (ours, sockets): (Vec<_>, Vec<_>) = further.into_iter().unzip();
        let process = Arc::new(process);
        let custody = |((hello, descriptors), socket)| {
            Arc::new(Custody::new(hello, Arc::clone(&process), descriptors, socket))
        };
        let shards = received.into_iter().zip([socket].into_iter().chain(ours)).map(custody).collect();
        Ok(Self { shards, sockets })
    }

    /// Tells the VMM that its machine is taken, and gives it the sockets of its agents.
    ///
    /// # Errors
    /// [`HandoverError::Send`].
    pub fn accept(&self, machine: MachineId, epoch: u64) -> Result<(), HandoverError> {
        let sockets: Vec<_> = self.sockets.iter().map(AsFd::as_fd).collect();
        let welcome = Welcome::Accepted { machine: machine.0, epoch };
        self.shards.first().map_or(Ok(()), |first| Ok(first.tell(&welcome.encode(), &sockets)?))
    }

    /// The agents' ends of all sockets but the first.
    pub(super) fn agents(&self) -> &[OwnedFd] {
        &self.sockets
    }

    /// Tells the VMM that its machine is not taken. Best effort: one that does not listen learns it from the socket's end.
    pub fn refuse(&self, reason: String) {
        if let Some(first) = self.shards.first() {
            let _ = first.tell(&Welcome::Refused { reason }.encode(), &[]);
        }
    }
}

/// A shard's message and its descriptors, RAM's and the airlock's.
type Received = (Hello, [Userfaultfd; 2]);
/// The two ends of a socket: ours and the agent's.
type Pair = (OwnedFd, OwnedFd);

/// Receives a message for each shard, `wait`ing before each, and makes the sockets of all shards but the first.
fn receive_all(
    socket: &OwnedFd,
    mut wait: impl FnMut() -> Result<(), HandoverError>,
) -> Result<(Vec<Received>, Vec<Pair>), HandoverError> {
    wait()?;
    let mut received = vec![receive_one(socket)?];
    for _ in 1..received[0].0.shards {
        wait()?;
        received.push(receive_one(socket)?);
    }
    check(received.iter().map(|(hello, _)| hello))?;
    let pairs = received.iter().skip(1).map(|_| fdpass::seqpacket_pair()).collect::<io::Result<_>>();
    Ok((received, pairs.map_err(HandoverError::Socket)?))
}

fn receive_one(socket: &OwnedFd) -> Result<Received, HandoverError> {
    let mut bytes = vec![0; DATAGRAM_MAX];
    let received = fdpass::recv(socket, &mut bytes, 2)?.ok_or(HandoverError::Closed)?;
    let hello = Hello::decode(&bytes[..received.bytes], received.descriptors.len())?;
    let mut descriptors = received.descriptors.into_iter().map(Userfaultfd::try_from);
    let mut next = || descriptors.next().ok_or(WireError::Descriptors { found: 0, expected: 2 });
    Ok((hello, [next()??, next()??]))
}

/// Checks that what was handed over, in this order, is one machine: all its shards, of the same name, in the order of
/// their guest addresses, no page of guest or host in two of them, and not more than a machine may have.
///
/// # Errors
/// [`WireError::WrongShard`], [`WireError::Overlap`], [`WireError::Layout`].
fn check<'a>(hellos: impl ExactSizeIterator<Item = &'a Hello> + Clone) -> Result<(), WireError> {
    let name = hellos.clone().next().map(|first| &first.name);
    let of = u32::try_from(hellos.len()).unwrap_or(u32::MAX);
    for (hello, due) in hellos.clone().zip(0..) {
        let is_due = (hello.shard, hello.shards) == (due, of);
        if !is_due || Some(&hello.name) != name {
            let Hello { shard, shards, ref name, .. } = *hello;
            return Err(WireError::WrongShard { shard, shards, name: name.clone(), due, of });
        }
    }
    wire::check_apart(hellos.clone().flat_map(host_ranges).collect())?;
    let regions = hellos.flat_map(|hello| hello.layout.regions()).copied().collect();
    GuestLayout::new(regions).map(drop).map_err(WireError::Layout)
}

/// Everything of the VMM's address space that a shard names.
fn host_ranges(hello: &Hello) -> impl Iterator<Item = (Hva, ByteCount)> + '_ {
    let regions = hello.hvas.iter().zip(hello.layout.regions()).map(|(hva, region)| (*hva, region.bytes));
    regions.chain([(hello.airlock_base, hello.airlock_bytes())])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uffd::wire::{FEATURES_NEEDED, SHARDS_MAX};
    use plimsoll_core::layout::Region;
    use plimsoll_sys::ProcessId;
    use plimsoll_sys::uffd::Mode;
    use plimsoll_types::Gpa;
    use std::thread;

    const GIB: u64 = 1 << 30;
    /// Where all that is waited for is there, or never comes.
    const LONG: Duration = Duration::from_secs(180);

    /// Shards of 1 GiB, one after the other in guest and host, airlocks elsewhere.
    fn machine(shards: u32) -> Vec<Hello> {
        let shard = |shard: u32| {
            let at = u64::from(shard) * GIB;
            let region = Region { start: Gpa(at), bytes: ByteCount(GIB) };
            Hello {
                name: "m".to_owned(),
                shard,
                shards,
                layout: GuestLayout::new(vec![region]).unwrap(),
                hvas: vec![Hva((1 << 40) + at)],
                airlock_base: Hva((1 << 41) + at),
                airlock_slots: 4,
                features: FEATURES_NEEDED,
            }
        };
        (0..shards).map(shard).collect()
    }

    fn changed(change: impl FnOnce(&mut Vec<Hello>)) -> Vec<Hello> {
        let mut hellos = machine(3);
        change(&mut hellos);
        hellos
    }

    #[test]
    fn a_shard_comes_out_as_it_went_in() {
        for hello in machine(SHARDS_MAX) {
            assert_eq!(Hello::decode(&hello.encode(), 2), Ok(hello));
        }
        for (shard, shards) in [(0, 0), (1, 1), (64, 64), (0, 65), (u32::MAX, u32::MAX)] {
            let hello = Hello { shard, shards, ..machine(1).remove(0) };
            assert_eq!(Hello::decode(&hello.encode(), 2), Err(WireError::Shard { shard, shards }));
        }
    }

    #[test]
    fn only_all_shards_of_one_machine_in_order_and_apart_are_one() {
        assert_eq!(check(machine(1).iter()), Ok(()));
        assert_eq!(check(machine(64).iter()), Ok(()));
        let far =
            |start| GuestLayout::new(vec![Region { start: Gpa(start), bytes: ByteCount(GIB) }]).unwrap();
        let huge =
            |start| GuestLayout::new(vec![Region { start: Gpa(start), bytes: ByteCount(1 << 43) }]).unwrap();
        let cases = [
            (
                changed(|all| all[1].shard = 2),
                "shard 2 of 3 was handed over as \"m\" where shard 1 of 3 was due",
            ),
            (
                changed(|all| all.swap(0, 1)),
                "shard 1 of 3 was handed over as \"m\" where shard 0 of 3 was due",
            ),
            (changed(|all| all[2].shards = 4), "shard 2 of 4 was handed over"),
            (changed(|all| drop(all.pop())), "shard 0 of 3 was handed over"),
            (changed(|all| all[2].name = "n".into()), "as \"n\" where shard 2 of 3 was due"),
            (changed(|all| all[2].hvas[0].0 -= 4096), "the host ranges at"),
            (changed(|all| all[2].airlock_base = all[0].airlock_base), "the host ranges at"),
            (changed(|all| all[0].airlock_base = all[2].hvas[0]), "the host ranges at"),
            (changed(|all| all[1].layout = far(GIB / 2)), "layout is not acceptable"),
            (changed(|all| all[0].layout = far(8 * GIB)), "layout is not acceptable"),
            (
                changed(|all| {
                    for (hello, place) in all.iter_mut().zip(1..) {
                        hello.layout = huge(place << 44);
                        hello.hvas = vec![Hva(place << 44)];
                    }
                }),
                "layout is not acceptable",
            ),
        ];
        for (hellos, expected) in cases {
            let found = explain(&check(hellos.iter()).expect_err(expected));
            assert!(found.contains(expected), "{expected:?} was expected, found: {found}");
        }
    }

    /// Hands these over, with two userfaultfds each, and returns what the manager's side, which waits that long for more, says and what
    /// the VMM hears.
    fn hand_over(hellos: &[Hello], patience: Duration) -> Option<(Result<Handover, HandoverError>, OwnedFd)> {
        let uffds = match (Userfaultfd::open(Mode::UserOnly), Userfaultfd::open(Mode::UserOnly)) {
            (Ok(ram), Ok(airlock)) => [ram, airlock],
            (Err(error), _) | (_, Err(error)) => {
                println!("SKIPPED: {}", explain(&error));
                return None;
            }
        };
        let (ours, theirs) = fdpass::seqpacket_pair().unwrap();
        for hello in hellos {
            fdpass::send(&theirs, &hello.encode(), &uffds.each_ref().map(AsFd::as_fd)).unwrap();
        }
        let process = Pidfd::open(ProcessId::own()).unwrap();
        Some((Handover::receive(ours, process, patience), theirs))
    }

    fn heard(socket: &OwnedFd) -> (Welcome, Vec<OwnedFd>) {
        let mut bytes = [0; DATAGRAM_MAX];
        let received = fdpass::recv(socket, &mut bytes, 63).unwrap().expect("a word before the end");
        (Welcome::decode(&bytes[..received.bytes]).unwrap(), received.descriptors)
    }

    #[test]
    fn each_shard_gets_a_socket_whose_other_end_its_agent_gets() {
        for shards in [1, 3, SHARDS_MAX] {
            let Some((handover, vmm)) = hand_over(&machine(shards), LONG) else { return };
            let handover = handover.unwrap();
            handover.accept(MachineId(9), 5).unwrap();
            let (welcome, further) = heard(&vmm);
            assert_eq!(welcome, Welcome::Accepted { machine: 9, epoch: 5 });
            assert_eq!((handover.shards.len(), further.len() + 1), (shards as usize, shards as usize));
            let agents: Vec<_> = [&vmm].into_iter().chain(&further).collect();
            for ((shard, agent), index) in handover.shards.iter().zip(agents).zip(0..) {
                assert_eq!(shard.hello.shard, index);
                shard.tell(&index.to_le_bytes(), &[]).unwrap();
                let mut bytes = [0; 4];
                fdpass::recv(agent, &mut bytes, 0).unwrap().unwrap();
                assert_eq!(bytes, index.to_le_bytes());
            }
        }
    }

    #[test]
    fn a_machine_of_which_a_shard_is_missing_or_wrong_is_refused_whole() {
        let wrong = changed(|all| all[1].name = "n".into());
        let short = Duration::from_millis(200);
        for (hellos, patience, expected) in
            [(&machine(3)[..2], short, "handed nothing over"), (&wrong, LONG, "was handed over as")]
        {
            let Some((handover, vmm)) = hand_over(hellos, patience) else { return };
            let found = explain(&handover.expect_err("a machine was taken of which a shard is missing"));
            assert!(found.contains(expected), "{expected:?} was expected, found: {found}");
            let (welcome, descriptors) = heard(&vmm);
            assert!(matches!(welcome, Welcome::Refused { .. }) && descriptors.is_empty(), "{welcome:?}");
            assert!(fdpass::recv(&vmm, &mut [0], 0).unwrap().is_none(), "the socket is still open");
        }
    }

    #[test]
    fn a_vmm_that_ends_between_two_shards_is_refused_at_once() {
        let Some(uffd) = Userfaultfd::open(Mode::UserOnly).ok() else { return };
        let (ours, theirs) = fdpass::seqpacket_pair().unwrap();
        fdpass::send(&theirs, &machine(2)[0].encode(), &[uffd.as_fd(), uffd.as_fd()]).unwrap();
        let vmm = thread::spawn(move || drop(theirs));
        let process = Pidfd::open(ProcessId::own()).unwrap();
        let refused = Handover::receive(ours, process, LONG);
        assert!(matches!(refused, Err(HandoverError::Closed)), "{refused:?}");
        vmm.join().unwrap();
    }
}
