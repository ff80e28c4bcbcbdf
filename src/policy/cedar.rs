//! A policy in the Cedar language: the same questions as [`Rules`](super::Rules) answer, asked of the `cedar-policy` crate.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::path::Path;

use cedar_policy::{
    Authorizer, Context, Decision as CedarDecision, Entities, Entity, EntityId, EntityTypeName, EntityUid, PolicyId,
    PolicySet, Request as Question, RestrictedExpression, Schema, ValidationMode, Validator,
};

use super::file::{MAX_RULES, RulesError};
use super::{Caller, Decision, Policy};
use crate::packet::{Identity, Register, Request};

/// What policies can speak of.
const SCHEMA: &str = include_str!("cedar.schema");

/// A policy in the [Cedar](https://www.cedarpolicy.com) language.
///
/// The principal is a `Node` with an `id` and a `role`. It may `register` (itself is the resource), must then be allowed to
/// `offer` every `Service`, `Tag` and domain of `Files` that it names, and may `request` a `Service`, with the context's
/// `selector`, `tags`, `target` and `through`. What no policy permits, what one forbids, and what cannot be evaluated is denied.
///
/// ```
/// use nanite::policy::CedarPolicy;
///
/// let policy = CedarPolicy::from_text(r#"
///     @id("workers")
///     permit (principal, action in [Action::"register", Action::"offer"], resource)
///     when { principal.id like "nanite-w*" };
///
///     @id("operators")
///     permit (principal, action == Action::"request", resource)
///     when { principal.role == "mapper" && resource.name like "/work/*" };
/// "#)?;
/// assert_eq!(policy.names(), ["operators", "workers"]);
/// # Ok::<(), nanite::policy::RulesError>(())
/// ```
pub struct CedarPolicy {
    policies: PolicySet,
    schema: Schema,
    authorizer: Authorizer,
}

impl CedarPolicy {
    /// Reads policies, and checks that they speak only of what there is.
    ///
    /// # Errors
    /// [`RulesError::Invalid`] says what is wrong and where.
    pub fn from_text(text: &str) -> Result<Self, RulesError> {
        let invalid = |error: &dyn fmt::Display| RulesError::Invalid(error.to_string());
        let policies: PolicySet = text.parse().map_err(|error| invalid(&error))?;
        if policies.num_of_policies() > MAX_RULES {
            return Err(RulesError::Invalid(format!("more than {MAX_RULES} policies")));
        }
        if policies.num_of_templates() > 0 {
            return Err(RulesError::Invalid("a template: it would decide nothing; write a policy".into()));
        }
        let (schema, _) = Schema::from_cedarschema_str(SCHEMA).map_err(|error| invalid(&error))?;
        let checked = Validator::new(schema.clone()).validate(&policies, ValidationMode::Strict);
        if let Some(error) = checked.validation_errors().next() {
            return Err(invalid(error));
        }
        let policy = Self { policies, schema, authorizer: Authorizer::new() };
        let mut names = BTreeSet::new();
        match policy.names().into_iter().find(|name| !names.insert(name.clone())) {
            Some(twice) => Err(RulesError::Invalid(format!("two policies are named {twice:?}"))),
            None => Ok(policy),
        }
    }

    /// Reads policies from a file of at most 1 MiB. Blocks.
    ///
    /// # Errors
    /// [`RulesError`] says why they cannot be used; a missing file is an error, not an empty policy.
    pub fn from_file(path: &Path) -> Result<Self, RulesError> {
        Self::from_text(&super::file::read(path)?)
    }

    /// The names of all policies, sorted: what `@id` says, or `policy0`, `policy1` and so on.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.policies.policies().map(|policy| self.name(policy.id())).collect();
        names.sort();
        names
    }

    fn name(&self, id: &PolicyId) -> String {
        self.policies.annotation(id, "id").map_or_else(|| id.to_string(), str::to_owned)
    }

    /// Asks one question; no answer is a denial.
    fn ask(&self, principal: &Identity, action: &str, resource: Thing<'_>, context: Context) -> Decision {
        self.answer(principal, action, resource, context).unwrap_or_else(|error| {
            tracing::error!(error, "the policy gives no answer");
            Decision::denied()
        })
    }

    fn answer(
        &self,
        principal: &Identity,
        action: &str,
        resource: Thing<'_>,
        context: Context,
    ) -> Result<Decision, String> {
        let principal = Thing::Node(principal);
        let question = Question::new(principal.uid()?, uid("Action", action)?, resource.uid()?, context, None)
            .map_err(|error| error.to_string())?;
        let mut entities = vec![principal.entity()?];
        if principal.uid()? != resource.uid()? {
            entities.push(resource.entity()?);
        }
        let entities = Entities::from_entities(entities, Some(&self.schema)).map_err(|error| error.to_string())?;
        let response = self.authorizer.is_authorized(&question, &self.policies, &entities);
        if let Some(error) = response.diagnostics().errors().next() {
            return Err(error.to_string());
        }
        let decision = match response.decision() {
            CedarDecision::Allow => Decision::allow(),
            CedarDecision::Deny => Decision::denied(),
        };
        // The least name, so that the audit log says the same each time.
        let rule = response.diagnostics().reason().map(|id| self.name(id)).min();
        Ok(Decision { rule, ..decision })
    }
}

/// What is asked about.
#[derive(Clone, Copy)]
enum Thing<'a> {
    Node(&'a Identity),
    Service(&'a str),
    Tag(&'a str),
    Files(&'a str),
}

impl Thing<'_> {
    fn uid(self) -> Result<EntityUid, String> {
        match self {
            Thing::Node(identity) => uid("Node", identity.as_str()),
            Thing::Service(name) => uid("Service", name),
            Thing::Tag(name) => uid("Tag", name),
            Thing::Files(name) => uid("Files", name),
        }
    }

    fn entity(self) -> Result<Entity, String> {
        let text = |text: &str| RestrictedExpression::new_string(text.to_owned());
        let attributes: HashMap<_, _> = match self {
            Thing::Node(identity) => HashMap::from([
                ("id".to_owned(), text(identity.as_str())),
                ("role".to_owned(), text(identity.role().as_str())),
            ]),
            Thing::Service(name) | Thing::Tag(name) | Thing::Files(name) => {
                HashMap::from([("name".to_owned(), text(name))])
            }
        };
        Entity::new(self.uid()?, attributes, HashSet::new()).map_err(|error| error.to_string())
    }
}

fn uid(kind: &str, name: &str) -> Result<EntityUid, String> {
    let kind: EntityTypeName = kind.parse().map_err(|_| format!("{kind} is no type"))?;
    Ok(EntityUid::from_type_name_and_id(kind, EntityId::new(name)))
}

/// What is known of a request beside its service.
fn context(caller: &Caller<'_>, request: &Request) -> Option<Context> {
    let text = |text: &str| RestrictedExpression::new_string(text.to_owned());
    let tags = request.tags.iter().map(|tag| text(tag.as_str()));
    let mut pairs = vec![
        ("selector".to_owned(), text(request.selector.as_str())),
        ("tags".to_owned(), RestrictedExpression::new_set(tags)),
    ];
    pairs.extend(request.target.as_ref().map(|target| ("target".to_owned(), text(target.as_str()))));
    pairs.extend(caller.on_behalf_of.map(|_| ("through".to_owned(), text(caller.identity.as_str()))));
    Context::from_pairs(pairs).ok()
}

impl Policy for CedarPolicy {
    fn authorize_registration(&self, caller: &Caller<'_>, register: &Register) -> Decision {
        let services = register.services.iter().map(|service| Thing::Service(service.as_str()));
        let tags = register.tags.iter().map(|tag| Thing::Tag(tag.as_str()));
        let files = register.files.iter().map(|domain| Thing::Files(domain.as_str()));
        let agent = caller.identity;
        let registers = self.ask(agent, "register", Thing::Node(agent), Context::empty());
        if !registers.allowed {
            return registers;
        }
        let mut offers =
            services.chain(tags).chain(files).map(|thing| self.ask(agent, "offer", thing, Context::empty()));
        offers.find(|decision| !decision.allowed).unwrap_or(registers)
    }

    fn authorize_request(&self, caller: &Caller<'_>, request: &Request) -> Decision {
        match context(caller, request) {
            Some(context) => {
                self.ask(caller.origin(), "request", Thing::Service(request.service.resolved().as_str()), context)
            }
            None => Decision::denied(),
        }
    }
}

impl fmt::Debug for CedarPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CedarPolicy").field(&self.names()).finish()
    }
}
