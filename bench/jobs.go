package bench

// Jobs are all of them, in the order they are run.
var Jobs = []*Job{
	&Checkout, &CheckoutParallel, &CheckoutGrowth,
	&Read, &ReadDelayed, &ReadParallel, &ReadGrowth,
	&Write, &Copy,
	&PolicyPoint, &PolicyRange, &PolicyAggregate, &PolicyJoin,
	&Schema,
}
