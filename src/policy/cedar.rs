//! Policies in the Cedar language, evaluated by the `cedar-policy` crate.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::path::Path;

use cedar_policy::{
    Authorizer, Context, Decision as CedarDecision, Entities, Entity, EntityId, EntityTypeName, EntityUid, PolicyId,
    PolicySet, Request as CedarRequest, RestrictedExpression, Schema, ValidationMode, Validator,
};

use super::rules::{MAX_RULES, PolicyError, read_file};
use super::{Caller, Decision, FileTransfer, Policy};
use crate::packet::{Identity, Register, Request};

/// The entities, actions and context that policies can use.
const SCHEMA: &str = include_str!("cedar.schema");

/// A policy in the [Cedar](https://www.cedarpolicy.com) language.
///
/// The principal is a `Node` with an `id` and a `role`. There are four actions: `register`, with the node itself as the resource;
/// `offer`, for every `Service`, `Tag` and domain of `Files` in a registration; `request`, for a `Service`, with `selector`,
/// `tags`, `target` and `through` in the context; and `send-file`, for a domain of `Files`, with `name`, `size` and `replaces`. Whatever no policy permits, a policy forbids, or cannot be evaluated is denied.
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
/// # Ok::<(), nanite::policy::PolicyError>(())
/// ```
pub struct CedarPolicy {
    policies: PolicySet,
    schema: Schema,
    authorizer: Authorizer,
}

impl CedarPolicy {
    /// Reads policies and validates them against the schema.
    ///
    /// # Errors
    /// [`PolicyError::Invalid`] with the mistake and its place.
    pub fn from_text(text: &str) -> Result<Self, PolicyError> {
        let invalid = |error: &dyn fmt::Display| PolicyError::Invalid(error.to_string());
        let policies: PolicySet = text.parse().map_err(|error| invalid(&error))?;
        if policies.num_of_policies() > MAX_RULES {
            return Err(PolicyError::Invalid(format!("more than {MAX_RULES} policies")));
        }
        if policies.num_of_templates() > 0 {
            return Err(PolicyError::Invalid("templates are not supported: write policies".into()));
        }
        let (schema, _) = Schema::from_cedarschema_str(SCHEMA).map_err(|error| invalid(&error))?;
        let validation = Validator::new(schema.clone()).validate(&policies, ValidationMode::Strict);
        if let Some(error) = validation.validation_errors().next() {
            return Err(invalid(error));
        }
        let policy = Self { policies, schema, authorizer: Authorizer::new() };
        let mut names = BTreeSet::new();
        match policy.names().into_iter().find(|name| !names.insert(name.clone())) {
            Some(duplicate) => Err(PolicyError::Invalid(format!("two policies have the name {duplicate:?}"))),
            None => Ok(policy),
        }
    }

    /// Reads policies from a file of at most 1 MiB. Blocks.
    ///
    /// # Errors
    /// [`PolicyError`]; a missing file is an error, not an empty policy.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, PolicyError> {
        Self::from_text(&read_file(path.as_ref())?)
    }

    /// The names of all policies, sorted: the `@id` annotation, or `policy0`, `policy1` and so on.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.policies.policies().map(|policy| self.name(policy.id())).collect();
        names.sort();
        names
    }

    fn name(&self, id: &PolicyId) -> String {
        self.policies.annotation(id, "id").map_or_else(|| id.to_string(), str::to_owned)
    }

    /// Evaluates the policies; an error is a denial.
    fn decide(&self, principal: &Identity, action: &str, resource: Resource<'_>, context: Context) -> Decision {
        self.evaluate(principal, action, resource, context).unwrap_or_else(|error| {
            tracing::error!(error, "cannot evaluate the Cedar policy; denied");
            Decision::denied()
        })
    }

    fn evaluate(
        &self,
        principal: &Identity,
        action: &str,
        resource: Resource<'_>,
        context: Context,
    ) -> Result<Decision, String> {
        let principal = Resource::Node(principal);
        let request = CedarRequest::new(principal.uid()?, uid("Action", action)?, resource.uid()?, context, None)
            .map_err(|error| error.to_string())?;
        let mut entities = vec![principal.entity()?];
        if principal.uid()? != resource.uid()? {
            entities.push(resource.entity()?);
        }
        let entities = Entities::from_entities(entities, Some(&self.schema)).map_err(|error| error.to_string())?;
        let response = self.authorizer.is_authorized(&request, &self.policies, &entities);
        if let Some(error) = response.diagnostics().errors().next() {
            return Err(error.to_string());
        }
        let decision = match response.decision() {
            CedarDecision::Allow => Decision::allow(),
            CedarDecision::Deny => Decision::denied(),
        };
        // Several policies may have decided: the first name in order, so that the audit log is deterministic.
        let rule = response.diagnostics().reason().map(|id| self.name(id)).min();
        Ok(Decision { rule, ..decision })
    }
}

/// An entity: the resource of an action, or the principal.
#[derive(Clone, Copy)]
enum Resource<'a> {
    Node(&'a Identity),
    Service(&'a str),
    Tag(&'a str),
    Files(&'a str),
}

impl Resource<'_> {
    fn uid(self) -> Result<EntityUid, String> {
        match self {
            Resource::Node(identity) => uid("Node", identity.as_str()),
            Resource::Service(name) => uid("Service", name),
            Resource::Tag(name) => uid("Tag", name),
            Resource::Files(name) => uid("Files", name),
        }
    }

    fn entity(self) -> Result<Entity, String> {
        let text = |text: &str| RestrictedExpression::new_string(text.to_owned());
        let attributes: HashMap<_, _> = match self {
            Resource::Node(identity) => HashMap::from([
                ("id".to_owned(), text(identity.as_str())),
                ("role".to_owned(), text(identity.role().as_str())),
            ]),
            Resource::Service(name) | Resource::Tag(name) | Resource::Files(name) => {
                HashMap::from([("name".to_owned(), text(name))])
            }
        };
        Entity::new(self.uid()?, attributes, HashSet::new()).map_err(|error| error.to_string())
    }
}

fn uid(kind: &str, name: &str) -> Result<EntityUid, String> {
    let kind: EntityTypeName = kind.parse().map_err(|_| format!("{kind} is not a valid entity type"))?;
    Ok(EntityUid::from_type_name_and_id(kind, EntityId::new(name)))
}

/// The context of a request: everything but its service.
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

/// The context of a file: everything but its domain. None if its size is beyond Cedar's numbers.
fn file_context(file: &FileTransfer<'_>) -> Option<Context> {
    let pairs = [
        ("name".to_owned(), RestrictedExpression::new_string(file.name.to_owned())),
        ("size".to_owned(), RestrictedExpression::new_long(i64::try_from(file.size).ok()?)),
        ("replaces".to_owned(), RestrictedExpression::new_bool(file.replaces)),
    ];
    Context::from_pairs(pairs).ok()
}

impl Policy for CedarPolicy {
    fn authorize_registration(&self, caller: &Caller<'_>, register: &Register) -> Decision {
        let services = register.services.iter().map(|service| Resource::Service(service.as_str()));
        let tags = register.tags.iter().map(|tag| Resource::Tag(tag.as_str()));
        let files = register.files.iter().map(|domain| Resource::Files(domain.as_str()));
        let agent = caller.identity;
        let registration = self.decide(agent, "register", Resource::Node(agent), Context::empty());
        if !registration.allowed {
            return registration;
        }
        let mut offers =
            services.chain(tags).chain(files).map(|resource| self.decide(agent, "offer", resource, Context::empty()));
        offers.find(|decision| !decision.allowed).unwrap_or(registration)
    }

    fn authorize_request(&self, caller: &Caller<'_>, request: &Request) -> Decision {
        match context(caller, request) {
            Some(context) => {
                self.decide(caller.origin(), "request", Resource::Service(request.service.resolved().as_str()), context)
            }
            None => Decision::denied(),
        }
    }

    fn authorize_file(&self, sender: &Caller<'_>, file: &FileTransfer<'_>) -> Decision {
        match file_context(file) {
            Some(context) => self.decide(sender.identity, "send-file", Resource::Files(file.domain.as_str()), context),
            None => Decision::denied(),
        }
    }
}

impl fmt::Debug for CedarPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CedarPolicy").field(&self.names()).finish()
    }
}
