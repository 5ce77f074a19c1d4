import { Empty } from '@/components/Empty';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { Page } from '@/components/Page';
import css from '@/features/training/JobsPage.module.css';
import { ago } from '@/lib/format';
import type { Batch } from '@/types/api';
import { Button, Skeleton, Text } from '@mantine/core';
import { useInfiniteQuery } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import { Link } from 'react-router';
import { BatchBadge } from './BatchBadge';
import { Counts } from './Counts';
import { Example } from './Example';
import { nameOf } from './name';
import { batchesQuery } from './queries';

export function BatchesPage() {
  const { t } = useTranslation();
  const batches = useInfiniteQuery(batchesQuery);
  const rows = batches.data?.pages.flatMap((page) => page.data) ?? [];
  const fresh = (
    <Button component={Link} to="/batches/new" leftSection={<Icon name="plus" />}>
      {t('batches.new')}
    </Button>
  );
  return (
    <Page title={t('batches.title')} lead={t('batches.lead')} actions={rows.length > 0 ? fresh : null}>
      {batches.isError && rows.length === 0 ? (
        <ErrorNote error={batches.error} retry={() => void batches.refetch()} />
      ) : null}
      {batches.isPending ? (
        <div role="status">
          <Text c="dimmed">{t('app.loading', { what: t('batches.title') })}</Text>
          <Skeleton height={72} mt="sm" radius="md" />
        </div>
      ) : null}
      {batches.isSuccess && rows.length === 0 ? (
        <>
          <Empty title={t('batches.none')} text={t('batches.noneText')}>
            {fresh}
          </Empty>
          <Text size="sm" c="dimmed" mb="xs">
            {t('batches.noneExample')}
          </Text>
          <Example />
        </>
      ) : null}
      {rows.length > 0 ? (
        <ul className={css.list} aria-label={t('batches.title')}>
          {rows.map((batch) => (
            <BatchRow key={batch.id} batch={batch} />
          ))}
        </ul>
      ) : null}
      {batches.hasNextPage ? (
        <Button
          variant="subtle"
          mt="md"
          loading={batches.isFetchingNextPage}
          onClick={() => void batches.fetchNextPage()}
        >
          {t('training.more')}
        </Button>
      ) : null}
    </Page>
  );
}

function BatchRow({ batch }: { batch: Batch }) {
  const { t, i18n } = useTranslation();
  return (
    <li>
      <Link to={`/batches/${batch.id}`} className={css.row}>
        <span className={css.name}>{nameOf(batch) ?? t('batches.untitled')}</span>
        <BatchBadge batch={batch} />
        <span className={css.more}>
          {[
            t('batches.onModel', { model: batch.model.split('/').at(-1) }),
            t('training.created', { ago: ago(batch.created_at, i18n.language) }),
          ].join(' · ')}
        </span>
        <span className={css.whole}>
          <Counts batch={batch} />
        </span>
      </Link>
    </li>
  );
}
