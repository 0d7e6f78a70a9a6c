//! The host's memory manager as a service: what joins the policy to the back ends, and keeps both alive.
