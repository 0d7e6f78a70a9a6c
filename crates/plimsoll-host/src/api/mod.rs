//! The daemon's API: HTTP and JSON on a Unix socket, and over TLS where the settings say so.
//!
//! Enters: requests of root, of the user that runs the daemon, and of whom the settings name. Leaves: answers of the schema in [`openapi`], which is checked in
//! as `docs/openapi.json`; faults with a code, a sentence and help. It has a thread of its own, the only one with tokio on it.
//! What must never happen: a client, however slow or hostile, keeping the control loop or a pager waiting.
//!
//! ```text
//! control loop --Moment--> exchange --last one--> routes    what is: no lock that the loop waits for
//!                                   --each------> archive   what was: reasons, minutes, counts; events
//!              <--Order---          <-------------          answered after the decision that follows it
//! ```
//!
//! * [`exchange`](mod@exchange): what the two sides have of each other. [`Settings`], `model`: what is said and shown. `fault`: what is refused.
//! * `routes`: which requests there are. `access`: who may ask. `serve`: how much. `tls`: certificates. `archive`: the past.
//!   [`client`]: the other end.
mod access;
mod archive;
pub mod client;
pub mod exchange;
mod fault;
mod model;
mod patience;
mod routes;
mod serve;
mod settings;
mod tls;

pub use access::{Access, AccessError};
pub(crate) use archive::{Archive, Counts};
pub use archive::{Happening, Sample};
pub use fault::{Code, Fault};
pub use model::{
    Cell, Group, Groups, Host, Machine, MachineKind, MachineState, Machines, Map, Memory, Pager, Pages,
    Plugged, Region, Table, Waiting,
};
pub use routes::{Attach, Budget, History, Opener, Reclaim, Why, openapi};
pub(crate) use serve::may_speak;
pub use serve::{Api, Gate, SOCKET, ServeError};
pub use settings::{Highest, Settings, SettingsKind};
pub use tls::{Credentials, Holds, TlsError};
