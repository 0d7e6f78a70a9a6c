//! What the loop and the API have of each other: the last moment, and orders.
//!
//! Enters: [`Moment`]s from the loop, [`Order`]s from the API. Leaves: each at the other side. What must never happen: the loop
//! waiting for a client, or an order carried out for a client that was told that it was not. So moments are put down and
//! picked up, orders are taken when the loop has time, and one whose asker has gone is dropped.
use super::fault::{Code, Fault};
use crate::config::Config;
use crate::control::Berth;
use crate::roster::Opened;
use crate::stores::Stores;
use crate::trace::Tick;
use parking_lot::Mutex;
use plimsoll_policy::settings::GroupSettings;
use plimsoll_policy::tree::Tree;
use plimsoll_sys::eventfd::EventFd;
use plimsoll_types::{ByteCount, MachineId, PageCount};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

use super::settings::Settings;

/// Orders that may wait for the loop.
pub(crate) const ORDERS_MAX: usize = 64;
/// Moments that may wait for whoever keeps their history: as many seconds. Later ones are missed there.
const MOMENTS_MAX: usize = 64;
/// How long an order may wait until the loop takes it. A decision takes milliseconds; reading all of /proc for machines that are
/// awaited, a second.
const ORDER_PATIENCE: Duration = Duration::from_secs(5);
/// How long whoever asked waits for the end of one that was taken: for the decision that follows, or for a VMM that has something back.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// A host after a decision.
#[derive(Debug)]
pub struct Moment {
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// What was seen, decided and done.
    pub tick: Tick,
    /// What an operator should hear.
    pub events: Vec<String>,
    /// The settings in force.
    pub tree: Arc<Tree>,
    /// The groups by name.
    pub groups: Arc<BTreeMap<String, GroupSettings>>,
    /// What else is known of the machines.
    pub berths: BTreeMap<MachineId, Berth>,
    /// Of machines that a rule speaks for, which one.
    pub rules: BTreeMap<MachineId, String>,
    /// Machines that are to be managed and are not, and why.
    pub waiting: Vec<(String, Option<String>)>,
    /// What of the memory is not for machines.
    pub own: ByteCount,
    /// What is in the stores of machines under our own pager.
    pub stores: Stores,
}

/// What an operator wants.
#[derive(Debug)]
pub enum Order {
    /// Manage a machine that was attached to, by what is said about it on top of what was said before.
    Attach(Box<Opened>, Settings),
    /// Put settings of a machine in force.
    Set(MachineId, Settings),
    /// Let a machine go.
    Release(MachineId),
    /// Wait no longer for a machine of that name.
    Forgo(String),
    /// Stop taking from it, or take again.
    Pause(MachineId, bool),
    /// Take so much from it once.
    Reclaim(MachineId, PageCount),
    /// Machines share so much.
    Budget(ByteCount),
    /// Put what the settings file says now in force, all of it or nothing.
    Reload(Box<Config>),
}

/// What became of an order: the machine it was about, if any.
pub type Obeyed = Result<Option<MachineId>, Fault>;

/// An order and where its answer goes.
pub(crate) struct Asked {
    pub(crate) order: Order,
    pub(crate) answer: oneshot::Sender<Obeyed>,
    claim: Claim,
}

/// Who has an order: the loop takes it, or whoever asked takes it back. The first of the two has it, for good.
#[derive(Clone, Debug, Default)]
struct Claim(Arc<AtomicBool>);

impl Claim {
    /// True for one of the two.
    fn take(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }
}

type Board = Arc<Mutex<Option<Arc<Moment>>>>;

/// The loop's side.
pub struct Desk {
    board: Board,
    feed: mpsc::Sender<Arc<Moment>>,
    orders: mpsc::Receiver<Asked>,
    asked: Arc<EventFd>,
}

/// The API's side.
pub struct Door {
    board: Board,
    orders: mpsc::Sender<Asked>,
    asked: Arc<EventFd>,
    pub(super) feed: Option<mpsc::Receiver<Arc<Moment>>>,
}

/// For those of the daemon itself who have an order.
pub struct Bell {
    orders: mpsc::Sender<Asked>,
    asked: Arc<EventFd>,
}

impl Bell {
    /// Has an order carried out, and waits for what becomes of it. Not for threads that somebody waits for.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn order(&self, order: Order) -> Obeyed {
        let (answered, _) = ask(&self.orders, &self.asked, order)?;
        answered.blocking_recv().unwrap_or_else(|_| Err(ended()))
    }
}

/// Both.
///
/// # Errors
/// When no eventfd is to be had.
pub fn exchange() -> io::Result<(Desk, Door)> {
    let (board, asked) = (Board::default(), Arc::new(EventFd::new()?));
    let (feed, fed) = mpsc::channel(MOMENTS_MAX);
    let (order, orders) = mpsc::channel(ORDERS_MAX);
    let desk = Desk { board: Arc::clone(&board), feed, orders, asked: Arc::clone(&asked) };
    Ok((desk, Door { board, orders: order, asked, feed: Some(fed) }))
}

impl Desk {
    /// Readable while somebody asks.
    pub(crate) fn asked(&self) -> Arc<EventFd> {
        Arc::clone(&self.asked)
    }

    /// The next order whose asker still waits; that one cannot take it back any more.
    pub(crate) fn next(&mut self) -> Option<Asked> {
        let mut waiting = std::iter::from_fn(|| self.orders.try_recv().ok());
        waiting.find(|asked| !asked.answer.is_closed() && asked.claim.take())
    }

    /// Has the loop come back for orders that still wait.
    pub(crate) fn remind(&self) {
        if !self.orders.is_empty() {
            let _ = self.asked.signal();
        }
    }

    /// Puts a moment where everybody sees it.
    pub(crate) fn show(&self, moment: Moment) {
        let moment = Arc::new(moment);
        *self.board.lock() = Some(Arc::clone(&moment));
        // Best effort: whoever keeps history misses what it has no time for.
        let _ = self.feed.try_send(moment);
    }
}

impl Door {
    /// Another way to have orders carried out.
    pub fn bell(&self) -> Bell {
        Bell { orders: self.orders.clone(), asked: Arc::clone(&self.asked) }
    }

    /// The last moment.
    pub(super) fn moment(&self) -> Result<Arc<Moment>, Fault> {
        // What was seen last is not how things are.
        if self.orders.is_closed() {
            return Err(ended());
        }
        let moment = self.board.lock().clone();
        moment.ok_or_else(|| Fault::new(Code::Busy, "nothing was decided yet"))
    }

    /// Has an order carried out. [`Code::Busy`]: it was not, and will not be. [`Code::Late`]: it was taken, and its end not waited for.
    pub(super) async fn order(&self, order: Order) -> Obeyed {
        self.order_until(order, sleep(ORDER_PATIENCE), sleep(END_PATIENCE)).await
    }

    async fn order_until(
        &self,
        order: Order,
        wanted: impl Future<Output = ()>,
        awaited: impl Future<Output = ()>,
    ) -> Obeyed {
        let (mut answered, claim) = ask(&self.orders, &self.asked, order)?;
        let told = |told: Result<Obeyed, _>| {
            told.unwrap_or_else(|_| match claim.take() {
                true => Err(ended()),
                false => Err(Fault::new(Code::Late, "the control loop has ended while it was carried out")),
            })
        };
        tokio::select! {
            biased;
            obeyed = &mut answered => return told(obeyed),
            () = wanted => {}
        }
        if claim.take() {
            let text = format!("the control loop had no time for it in {} s", ORDER_PATIENCE.as_secs());
            return Err(Fault::new(Code::Busy, text));
        }
        tokio::select! {
            biased;
            obeyed = answered => told(obeyed),
            () = awaited => {
                let text = format!("it has not come to its end in {} s", END_PATIENCE.as_secs());
                Err(Fault::new(Code::Late, text))
            }
        }
    }
}

/// Puts an order where the loop finds it.
fn ask(
    orders: &mpsc::Sender<Asked>,
    asked: &EventFd,
    order: Order,
) -> Result<(oneshot::Receiver<Obeyed>, Claim), Fault> {
    let ((answer, answered), claim) = (oneshot::channel(), Claim::default());
    match orders.try_send(Asked { order, answer, claim: claim.clone() }) {
        Ok(()) => {}
        Err(TrySendError::Full(_)) => {
            return Err(Fault::new(Code::TooMany, format!("{ORDERS_MAX} orders wait already")));
        }
        Err(TrySendError::Closed(_)) => return Err(ended()),
    }
    let _ = asked.signal();
    Ok((answered, claim))
}

fn ended() -> Fault {
    Fault::new(Code::Busy, "the control loop has ended")
        .help("machines have equal shares until the manager is replaced")
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Bell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bell").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Door").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::future::{pending, ready};

    const ORDER: Order = Order::Budget(ByteCount(1));

    fn run<T>(what: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(what)
    }

    #[test]
    fn an_order_that_waited_too_long_is_never_carried_out_and_whoever_asked_is_told_so() {
        let (mut desk, door) = exchange().unwrap();
        let refused = run(door.order_until(ORDER, ready(()), pending())).unwrap_err();
        assert_eq!((refused.code, refused.help.contains("nothing was changed")), (Code::Busy, true));
        assert!(desk.next().is_none(), "it is still there to be carried out");
    }

    #[test]
    fn the_end_of_an_order_that_was_taken_is_waited_for_and_where_it_is_not_that_is_told() {
        let (desk, door) = exchange().unwrap();
        let (desk, held) = (RefCell::new(desk), RefCell::new(None));
        // Taken in the last moment.
        let taken = || async { drop(held.replace(desk.borrow_mut().next())) };
        let answered = async {
            let Asked { answer, .. } = held.take().unwrap();
            answer.send(Ok(Some(MachineId(7)))).unwrap();
            pending().await
        };
        assert_eq!(run(door.order_until(ORDER, taken(), answered)), Ok(Some(MachineId(7))));
        let late = run(door.order_until(ORDER, taken(), ready(()))).unwrap_err();
        assert_eq!(late.code, Code::Late);
        assert!(!late.to_string().contains("nothing was changed"), "{late}");
        let dies = async {
            drop(held.take());
            pending().await
        };
        let lost = run(door.order_until(ORDER, taken(), dies)).unwrap_err();
        assert_eq!((lost.code, lost.message.contains("has ended while")), (Code::Late, true));
    }
}
