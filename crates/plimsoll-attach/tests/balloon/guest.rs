//! Simulated guests: what a balloon's driver and a guest's kernel do with what they are asked, in one place.
use plimsoll_attach::balloon::{Controller, Observation, State, Step};
use plimsoll_attach::control::GuestStatistics;
use plimsoll_types::ByteCount;
use std::time::Duration;

/// How a guest treats its balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Does as asked, at its speed, and pages when it is left with less than it uses.
    Honest,
    /// Gives this much and no more.
    Partial(ByteCount),
    /// Has no driver.
    Stuck,
    /// Takes back from the balloon what it uses.
    DeflatesOnOom,
}

/// One guest.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) kind: Kind,
    pub(crate) memory: ByteCount,
    /// What it uses and cannot drop.
    pub(crate) used: ByteCount,
    /// How fast its driver works, in bytes a second.
    pub(crate) speed: ByteCount,
    pub(crate) balloon: ByteCount,
    pub(crate) asked: ByteCount,
    pub(crate) now: Duration,
    swapped_in: ByteCount,
    /// How often it tells of itself, and what it told last, and when.
    pub(crate) period: Duration,
    told: (Duration, GuestStatistics),
    /// Whether it tells anything of itself.
    pub(crate) tells: bool,
}

impl Guest {
    pub(crate) fn new(kind: Kind, memory: ByteCount, used: ByteCount) -> Self {
        let zero = ByteCount(0);
        let speed = ByteCount(memory.0 / 4);
        let now = Duration::from_secs(1000);
        let (told, period) = ((now, GuestStatistics::default()), Duration::ZERO);
        let mut guest = Self {
            kind,
            memory,
            used,
            speed,
            balloon: zero,
            asked: zero,
            now,
            swapped_in: zero,
            period,
            told,
            tells: true,
        };
        guest.told.1 = guest.statistics();
        guest
    }

    /// Lets time pass.
    pub(crate) fn run(&mut self, time: Duration) {
        self.now += time;
        self.drive(time);
        if self.now >= self.told.0 + self.period {
            self.told = (self.now, self.statistics());
        }
    }

    /// What its driver does in that time.
    fn drive(&mut self, time: Duration) {
        let moved = u64::try_from(u128::from(self.speed.0) * time.as_millis() / 1000).unwrap_or(u64::MAX);
        if self.kind == Kind::Stuck {
            return;
        }
        let most = match self.kind {
            Kind::Partial(most) => most,
            Kind::DeflatesOnOom => self.memory.saturating_sub(self.used),
            Kind::Honest | Kind::Stuck => self.memory,
        };
        let goal = self.asked.min(most);
        let missing = goal.saturating_sub(self.balloon);
        self.balloon = self.balloon.min(goal) + ByteCount(missing.0.min(moved));
        let squeezed = self.used.saturating_sub(self.memory.saturating_sub(self.balloon));
        self.swapped_in += ByteCount(squeezed.0.min(moved));
    }

    /// What it would say now.
    pub(crate) fn statistics(&self) -> GuestStatistics {
        let left = self.memory.saturating_sub(self.balloon);
        GuestStatistics {
            age: Some(Duration::ZERO),
            available: Some(left.saturating_sub(self.used)),
            total: Some(self.memory),
            swapped_in: Some(self.swapped_in),
            ..GuestStatistics::default()
        }
    }

    pub(crate) fn observation(&self) -> Observation {
        Observation {
            now: self.now,
            memory: self.memory,
            actual: self.balloon,
            statistics: self
                .tells
                .then(|| GuestStatistics { age: Some(self.now - self.told.0), ..self.told.1 }),
            refaulted: ByteCount(0),
        }
    }

    /// One look of the controller's, and what the guest hears of it.
    pub(crate) fn look(&mut self, controller: &mut Controller, target: ByteCount) -> Step {
        let step = controller.step(&self.observation(), target);
        self.asked = step.ask.unwrap_or(self.asked);
        step
    }

    /// Looks once a second for so long; what was asked and how things were after each look.
    pub(crate) fn follow(
        &mut self,
        controller: &mut Controller,
        target: ByteCount,
        seconds: u32,
    ) -> Vec<(ByteCount, State)> {
        let mut seen = Vec::new();
        for _ in 0..seconds {
            self.run(Duration::from_secs(1));
            let step = self.look(controller, target);
            seen.push((self.asked, step.state));
        }
        seen
    }

    pub(crate) fn band(&self) -> ByteCount {
        ByteCount(self.memory.0 / 100)
    }

    /// What the controller is documented to leave available.
    pub(crate) fn reserve(&self) -> ByteCount {
        ByteCount(self.memory.0 / 16).clamp(ByteCount::mib(16), ByteCount::mib(512))
    }
}
