use crate::{node::Node, report::Report, transpile::Translation, version::Version};
pub(crate) fn to_v3(root: &Node, _: &mut Report) -> Translation {
    (Version::v3(0), root.clone())
}
