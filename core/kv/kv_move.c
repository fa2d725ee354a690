/* Moves between tiers. */
#include "kv/kv_int.h"

void move_forget_node(struct kv *kv, int32_t node) {}
void move_forget_snap(struct kv *kv, int32_t snap) {}
void move_update_node(struct kv *kv, int32_t node) {}
void move_update_snap(struct kv *kv, int32_t snap) {}
