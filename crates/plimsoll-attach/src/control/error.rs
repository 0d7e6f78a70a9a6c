//! What can go wrong between us and a machine's management interface, and whose fault it is.
//!
//! Enters: what the socket, the parser or the VMM said. Leaves: one sentence that an operator can act on. What must never
//! happen: text of a VMM reaching a terminal unwashed, or at any length.
use plimsoll_types::ByteCount;
use std::io;
use std::time::Duration;

/// How much of a foreign text is quoted, in characters: a sentence or two of the VMM's.
const QUOTE_MAX: usize = 300;

/// A request to a machine's management interface failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Nobody listens there, or we may not connect.
    #[error("cannot reach {interface}: check that the machine runs and that this user may connect")]
    Unreachable {
        /// The interface, as [`Control::interface`](super::Control::interface) names it.
        interface: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The connection ended before the answer did.
    #[error("{interface} closed the connection before it had answered {request}: its VMM may have ended")]
    Lost {
        /// The interface.
        interface: String,
        /// What was asked.
        request: String,
        /// What the kernel said, if it was more than an end of file.
        #[source]
        source: Option<io::Error>,
    },
    /// No answer came in time.
    #[error(
        "{interface} did not answer {request} within {patience:?}: its VMM is stopped, stuck or overloaded"
    )]
    Stalled {
        /// The interface.
        interface: String,
        /// What was asked.
        request: String,
        /// How long was waited.
        patience: Duration,
    },
    /// The answer is not what the interface is documented to say.
    #[error("{interface} answered {request} with something else than {expected}: {found:?}")]
    Garbage {
        /// The interface.
        interface: String,
        /// What was asked.
        request: String,
        /// What the answer should have been.
        expected: &'static str,
        /// The answer, or its beginning.
        found: String,
    },
    /// This machine was made without what was asked for.
    #[error("{interface} offers no {what}: the machine would have to be started with it")]
    Unsupported {
        /// The interface.
        interface: String,
        /// What is not there.
        what: &'static str,
    },
    /// The VMM understood and said no.
    #[error("{interface} refused {request}: {text}")]
    Refused {
        /// The interface.
        interface: String,
        /// What was asked.
        request: String,
        /// The VMM's own words.
        text: String,
    },
    /// We were asked for a size this machine cannot have. Nothing was sent.
    #[error("{what} cannot be {asked}: at most {maximum}, in steps of {step}")]
    OutOfRange {
        /// What has the size.
        what: &'static str,
        /// The size asked for.
        asked: ByteCount,
        /// The largest possible one.
        maximum: ByteCount,
        /// What it must be a multiple of.
        step: ByteCount,
    },
}

/// Where the cause of a [`ControlError`] lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// In the host's set-up: a path, a right, a machine that has ended.
    Setup,
    /// In the VMM: it breaks its own protocol. What it did with the request is not known.
    Vmm,
    /// In what was asked of this machine. The interface itself works.
    Request,
}

impl ControlError {
    /// Whose fault it is. Anything but [`Fault::Request`] means that the machine does not cooperate for now.
    pub const fn fault(&self) -> Fault {
        match self {
            Self::Unreachable { .. } => Fault::Setup,
            Self::Lost { .. } | Self::Stalled { .. } | Self::Garbage { .. } => Fault::Vmm,
            Self::Unsupported { .. } | Self::Refused { .. } | Self::OutOfRange { .. } => Fault::Request,
        }
    }
}

/// A foreign text that may be shown: of bounded length, without control characters.
pub(crate) fn quote(text: &str) -> String {
    let washed = text.trim().chars().map(|letter| if letter.is_control() { ' ' } else { letter });
    let mut quoted: String = washed.take(QUOTE_MAX).collect();
    if text.trim().chars().nth(QUOTE_MAX).is_some() {
        quoted.push('…');
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_text_is_shown_short_and_without_control_characters() {
        assert_eq!(quote(" no\u{1b}[2Jway\n "), "no [2Jway");
        let long = quote(&"x".repeat(5000));
        assert_eq!(long.chars().count(), QUOTE_MAX + 1);
    }
}
