//! Agents: long-running workers whose actors expose services.
//!
//! [`Agent::builder`] takes actors, made by [`actor`] from closures or by [`ProgramActors`] from programs, and starts the agent.

mod actor;
mod builder;
mod context;
mod dispatch;
mod exec;
mod presence;
mod run;
mod status;

pub use actor::{Actor, BlockingHandler, ExposeError, Handler, HandlerResult, Handlers, actor, reply};
pub use builder::AgentBuilder;
pub use context::Context;
pub use dispatch::{RunningJob, RunningJobs};
pub use exec::{ProgramActors, ProgramError, ProgramLimits, SkipReason, Skipped};
pub use run::{Agent, AgentError, Announcer};
pub use status::{LoadAverage, StatusSource};
