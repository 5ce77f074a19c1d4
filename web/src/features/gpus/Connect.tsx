import { CopyText } from '@/components/CopyText';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { meQuery } from '@/features/session/queries';
import type { Gpu } from '@/types/api';
import { Anchor, Button, CloseButton, Text, Title } from '@mantine/core';
import { useQuery } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { Link } from 'react-router';
import css from './Connect.module.css';
import { enrolTokenQuery } from './queries';

/** How a gpu gets here, step by step; it turns green when one that was not here before has enrolled. */
export function Connect({ gpus, onClose }: { gpus: readonly Gpu[]; onClose: () => void }) {
  const { t } = useTranslation();
  const me = useQuery(meQuery);
  const admin = me.data?.admin === true;
  const token = useQuery({ ...enrolTokenQuery, enabled: admin });
  const [before] = useState(() => new Map(gpus.filter((gpu) => gpu.alive).map((gpu) => [gpu.id, gpu.enrolled_at])));
  const arrived = gpus.find((gpu) => gpu.alive && before.get(gpu.id) !== gpu.enrolled_at);
  const [shown, setShown] = useState(false);
  const url = token.data?.relay_url ?? location.origin;
  const secret = token.data ? (shown ? token.data.token : '••••••••••••') : '…';
  const lines = (value: string) => `GPU_RELAY_URL=${url}\nGPU_ENROL_TOKEN=${value}`;
  return (
    <section className={css.connect} aria-label={t('gpus.connect')} data-arrived={arrived !== undefined}>
      <div className={css.head}>
        <Title order={2}>{t('gpus.connect')}</Title>
        <CloseButton aria-label={t('app.close')} onClick={onClose} />
      </div>
      <ol className={css.steps}>
        <li>
          <Text fw={600}>{t('gpus.connect1')}</Text>
          <Text size="sm" c="dimmed">
            {t('gpus.connect1Text')}
          </Text>
          <Anchor href="/colab_server.ipynb" download size="sm">
            {t('gpus.download')}
          </Anchor>
        </li>
        <li>
          <Text fw={600}>{t('gpus.connect2')}</Text>
          <Text size="sm" c="dimmed" mb="xs">
            {admin ? t('gpus.connect2Text') : t('gpus.connect2User')}
          </Text>
          {admin ? (
            <>
              {token.isError ? <ErrorNote error={token.error} /> : null}
              <CopyText
                text={lines(secret)}
                copied={token.data ? lines(token.data.token) : undefined}
                label={t('gpus.connect2')}
              />
              <Button
                size="compact-sm"
                variant="subtle"
                mt={6}
                leftSection={<Icon name="eye" size={16} />}
                onClick={() => setShown(!shown)}
                aria-pressed={shown}
              >
                {t('gpus.showToken')}
              </Button>
            </>
          ) : (
            <CopyText text={`GPU_RELAY_URL=${url}`} label="GPU_RELAY_URL" />
          )}
          {/^https?:\/\/(127\.|localhost|\[::1\])/.test(url) ? (
            <Text size="sm" className={css.warm} mt="xs">
              {t('gpus.loopback')}
            </Text>
          ) : null}
        </li>
        <li>
          <Text fw={600}>{t('gpus.connect3')}</Text>
          <Text size="sm" c="dimmed" mb="xs">
            {t('gpus.orCommand')}
          </Text>
          <CopyText
            text={`GPU_RELAY_URL=${url} GPU_ENROL_TOKEN=${secret} python -m gpu_service`}
            copied={
              token.data ? `GPU_RELAY_URL=${url} GPU_ENROL_TOKEN=${token.data.token} python -m gpu_service` : undefined
            }
            label="gpu_service"
          />
        </li>
      </ol>
      <div className={css.watch} role="status">
        <span className={css.light} aria-hidden="true" />
        {arrived ? (
          <div className={css.arrived}>
            <div>
              <Text fw={650}>{t('gpus.arrived', { name: arrived.name })}</Text>
              <Text size="sm" c="dimmed">
                {t('gpus.arrivedText', {
                  device: arrived.device.name,
                  models: arrived.models.map((model) => model.id).join(', '),
                })}
              </Text>
            </div>
            <Button component={Link} to="/" size="sm">
              {t('gpus.useIt')}
            </Button>
          </div>
        ) : (
          <Text size="sm">
            {t('gpus.watching')} {t('gpus.connect3Text')}
          </Text>
        )}
      </div>
    </section>
  );
}
