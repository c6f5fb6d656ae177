//! Every path in one place.

use axum::Router;
use axum::routing::{any, get, post, put};
use oblak_model::{EventKind, ImageKind, InstanceKind};

use crate::middleware::{Track, not_found, wrong_method};
use crate::state::App;
use crate::{admin, apply, cluster, explain, members, node, openapi, rest, stream};

/// The whole router.
pub(crate) fn router(app: App) -> Router {
    let mut router: Router<App> = Router::new();
    macro_rules! kinds {
        ($($kind:ty),* $(,)?) => {
            $( router = rest::routes::<$kind>(router); )*
        };
    }
    oblak_model::for_each_kind!(kinds);
    router = rest::everywhere::<EventKind>(router);
    router = rest::everywhere::<InstanceKind>(router);
    router = rest::offered::<ImageKind>(router);
    let instance = |tail: &str| {
        format!("/v1/projects/{{project}}/{}/{{name}}/{tail}", <InstanceKind as oblak_model::Kind>::PLURAL)
    };
    router
        .route("/healthz", get(admin::healthz))
        .route("/readyz", get(admin::readyz))
        .route("/metrics", get(admin::metrics))
        .route("/openapi.json", get(openapi::serve))
        .route("/docs", get(openapi::page))
        .route("/v1/version", get(admin::version))
        .route("/v1/ca.pem", get(admin::ca))
        .route("/v1/login", post(admin::login))
        .route("/v1/whoami", get(admin::whoami))
        .route("/v1/cluster/servers", get(cluster::servers))
        .route("/v1/projects/{project}/apply", post(apply::apply))
        .route(&instance("explain"), get(explain::explain))
        .route(&instance("usage"), get(explain::usage))
        .route(&instance("logs"), get(stream::logs))
        .route(&instance("console"), any(stream::console))
        .route(&instance("exec"), any(stream::exec))
        .route(&instance("vnc"), any(stream::vnc))
        .route(&instance("forward"), any(stream::forward))
        .route("/v1/projects/{project}/images/{name}/content", put(stream::upload))
        .route("/v1/cluster/status", get(members::status))
        .route("/v1/cluster/join-token", post(members::join_token))
        .route("/v1/cluster/join", post(members::join))
        .route("/v1/cluster/servers/{name}/remove", post(members::remove))
        .route("/v1/cluster/defragment", post(members::defragment))
        .route("/v1/cluster/backup", post(members::backup))
        .route("/v1/nodes/enroll", post(node::enroll))
        .route("/v1/nodes/{name}/remove", post(node::remove))
        .route("/v1/nodes/{name}/evacuate", post(node::evacuate))
        .route("/v1/nodes/{name}/certificate", post(node::renew))
        .route("/v1/nodes/{name}/register", post(node::register))
        .route("/v1/nodes/{name}/heartbeat", post(node::heartbeat))
        .route("/v1/nodes/{name}/report", post(node::report))
        .route("/v1/nodes/{name}/watch", get(node::watch))
        .route("/v1/nodes/{name}/tunnel", any(stream::tunnel))
        .route("/v1/nodes/{name}/images/{image}/content", get(stream::image_for_node))
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(Track(app.clone()))
        .with_state(app)
}
