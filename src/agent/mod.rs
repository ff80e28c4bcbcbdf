//! Agents: long-running workers whose actors expose services.
//!
//! [`Agent::builder`] takes actors, made by [`actor`] from closures or by [`ProgramActors`] from programs, and starts the agent.

mod actor;
mod builder;
mod dispatch;
mod exec;
mod presence;
mod run;

pub use actor::{Actor, BlockingHandler, Context, ExposeError, Handler, HandlerResult, Handlers, actor, reply};
pub use builder::AgentBuilder;
pub use dispatch::{RunningJob, RunningJobs};
pub use exec::{ProgramActors, ProgramError, ProgramLimits, SkipReason, Skipped};
pub use presence::{LoadAverage, StatusSource};
pub use run::{Agent, AgentError, Announcer};
