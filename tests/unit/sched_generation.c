/* generation_config.json: defaults, end tokens from either file, and refusals that name the field. */
#include "sched/engine.h"
#include "tap.h"

static struct generation_defaults g;
static struct arle_err err;

static int parse(const char *gen, const char *config)
{
    memset(&g, 0x55, sizeof g);
    return generation_parse(gen, gen ? strlen(gen) : 0, config, config ? strlen(config) : 0, &g, &err);
}

static void values(void)
{
    EXPECT_EQ(parse("{\"temperature\":0.7,\"top_p\":0.95,\"top_k\":20,\"min_p\":0.1,\"repetition_penalty\":1.5,\"do_sample\":true,"
                    "\"eos_token_id\":[7,3,7]}", "{\"eos_token_id\":9}"), 0);
    EXPECT_NEAR(g.temperature, 0.7, 1e-6);
    EXPECT_NEAR(g.top_p, 0.95, 1e-6);
    EXPECT_NEAR(g.min_p, 0.1, 1e-6);
    EXPECT_NEAR(g.repetition, 1.5, 1e-6);
    EXPECT_EQ(g.top_k, 20);
    EXPECT_EQ(g.n_eos, 2);
    EXPECT_EQ(g.eos[0], 7);
    EXPECT_EQ(g.eos[1], 3);
}

static void silence(void)
{
    EXPECT_EQ(parse(NULL, NULL), 0);
    EXPECT_NEAR(g.temperature, 1, 0);
    EXPECT_NEAR(g.top_p, 1, 0);
    EXPECT_NEAR(g.repetition, 1, 0);
    EXPECT_EQ(g.top_k, 0);
    EXPECT_EQ(g.n_eos, 0);
    EXPECT_EQ(parse("{\"do_sample\":false,\"temperature\":0.6,\"top_k\":null}", "{\"text_config\":{\"eos_token_id\":4}}"), 0);
    EXPECT_NEAR(g.temperature, 0, 0);
    EXPECT_EQ(g.n_eos, 1);
    EXPECT_EQ(g.eos[0], 4);
}

static void refusals(void)
{
    EXPECT_EQ(parse("[]", NULL), -EINVAL);
    EXPECT_EQ(parse("{", NULL), -EINVAL);
    EXPECT_EQ(parse("{\"temperature\":\"hot\"}", NULL), -EINVAL);
    EXPECT_STR(err.param, "temperature");
    EXPECT_EQ(parse("{\"top_p\":1.5}", NULL), -EINVAL);
    EXPECT_STR(err.param, "top_p");
    EXPECT_EQ(parse("{\"eos_token_id\":-1}", NULL), -EINVAL);
    EXPECT_EQ(parse("{\"eos_token_id\":[\"x\"]}", NULL), -EINVAL);
    EXPECT_STR(err.param, "eos_token_id");
    EXPECT_EQ(parse("{\"eos_token_id\":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]}", NULL), -EINVAL);
    EXPECT_EQ(parse(NULL, "7"), -EINVAL);
}

int main(void)
{
    RUN(values);
    RUN(silence);
    RUN(refusals);
    return tap_done();
}
