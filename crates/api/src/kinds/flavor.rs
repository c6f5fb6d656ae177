//! Flavors and events.

use oblak_identity::Principal;
use oblak_model::{ApiError, Code, EventKind, Flavor, FlavorKind, InstanceKind, Object};

use super::{Access, Resource, in_use, not_creatable};
use crate::draft::Draft;

impl Resource for FlavorKind {
    const ACCESS: Access = Access::Catalog;
    const NAMED_BY_OTHERS: bool = true;

    fn create(_: &mut Draft, _: &Principal, _: &mut Flavor, _: Option<&str>) -> Result<Option<String>, ApiError> {
        Ok(None)
    }

    fn may_delete(draft: &Draft, flavor: &Flavor) -> Result<(), ApiError> {
        let name = &flavor.metadata.name;
        for instance in draft.list::<InstanceKind>(None)? {
            if instance.status.resolved.flavor == *name {
                return Err(in_use(&flavor.describe(), &instance.describe()));
            }
        }
        Ok(())
    }
}

impl Resource for EventKind {
    const ACCESS: Access = Access::InProject;

    fn create(_: &mut Draft, _: &Principal, _: &mut Object<Self>, _: Option<&str>) -> Result<Option<String>, ApiError> {
        Err(not_creatable("event", "Oblak writes them"))
    }

    fn update(
        _: &mut Draft,
        _: &Principal,
        _: &Object<Self>,
        _: &mut Object<Self>,
        _: Option<&str>,
    ) -> Result<(), ApiError> {
        Err(ApiError::new(Code::Unsupported, "events cannot be changed; they say what happened"))
    }

    fn may_delete(_: &Draft, _: &Object<Self>) -> Result<(), ApiError> {
        Err(ApiError::new(Code::Unsupported, "events cannot be deleted by hand; they are dropped after a day"))
    }
}
