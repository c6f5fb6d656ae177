//! Images.

use oblak_identity::Principal;
use oblak_model::{ApiError, Code, Image, ImageKind, ImagePhase, ImageSource, ImageStatus, Visibility};
use oblak_store::objects;

use super::{Access, Resource, can_clean, in_use, needs_node};
use crate::docs::BY_IMAGE;
use crate::draft::Draft;

impl Resource for ImageKind {
    const ACCESS: Access = Access::InProject;
    const NAMED_BY_OTHERS: bool = true;

    fn offered(image: &Image) -> bool {
        image.spec.visibility == Visibility::Public
    }

    /// The password for a registry.
    fn take_secret(image: &mut Image) -> Option<String> {
        match &mut image.spec.source {
            ImageSource::Registry { password, .. } => password.take(),
            _ => None,
        }
    }

    fn create(
        draft: &mut Draft,
        by: &Principal,
        image: &mut Image,
        sealed: Option<&str>,
    ) -> Result<Option<String>, ApiError> {
        if image.spec.visibility == Visibility::Public {
            only_admin(by)?;
        }
        keep_password(draft, image, sealed);
        Ok(None)
    }

    fn update(
        draft: &mut Draft,
        by: &Principal,
        old: &Image,
        new: &mut Image,
        sealed: Option<&str>,
    ) -> Result<(), ApiError> {
        if old.spec.visibility != new.spec.visibility || new.spec.visibility == Visibility::Public {
            only_admin(by)?;
        }
        keep_password(draft, new, sealed);
        if new.spec.retry_generation < old.spec.retry_generation {
            return Err(ApiError::invalid("/spec/retry_generation", "may only grow"));
        }
        let again = new.spec.retry_generation > old.spec.retry_generation && old.status.phase == ImagePhase::Failed;
        let other = old.spec.source != new.spec.source || old.spec.checksum != new.spec.checksum || sealed.is_some();
        if again || other {
            if old.status.phase == ImagePhase::Ready
                && !draft.app.docs.find(BY_IMAGE, &old.metadata.id.to_string()).is_empty()
            {
                return Err(in_use(
                    &old.describe(),
                    "instances; make a new image instead of changing the content of this one",
                ));
            }
            // Imported anew, by the same node if there was one.
            let (node, wanted) = (new.status.node, new.status.wanted);
            // Copies of the old content are still there; the nodes drop them when they see the new digest.
            let nodes = std::mem::take(&mut new.status.nodes);
            new.status = ImageStatus { node, nodes, wanted, ..ImageStatus::default() };
        }
        Ok(())
    }

    fn may_delete(draft: &Draft, image: &Image) -> Result<(), ApiError> {
        let users = draft.app.docs.find(BY_IMAGE, &image.metadata.id.to_string());
        match users.first().and_then(|item| item.value.object()) {
            Some(doc) => Err(in_use(&image.describe(), &format!("instance/{}", doc.name))),
            None => Ok(()),
        }
    }

    fn begin_delete(draft: &mut Draft, image: &mut Image) -> Result<(), ApiError> {
        if can_clean(draft, image.status.node) {
            needs_node(image);
        }
        Ok(())
    }

    fn remove(draft: &mut Draft, image: &Image) -> Result<(), ApiError> {
        draft.delete(objects::secret_key("image", &image.metadata.id.to_string()));
        draft.remove(image);
        Ok(())
    }
}

fn only_admin(by: &Principal) -> Result<(), ApiError> {
    if by.is_cloud_admin() {
        return Ok(());
    }
    Err(ApiError::new(Code::Forbidden, "only a cloud admin offers images to every project").at("/spec/visibility"))
}

fn keep_password(draft: &mut Draft, image: &Image, sealed: Option<&str>) {
    if let Some(password) = sealed {
        draft.put(objects::secret_key("image", &image.metadata.id.to_string()), &password);
    }
}
