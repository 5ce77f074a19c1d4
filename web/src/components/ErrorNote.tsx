import { ApiError } from '@/lib/api';
import { Alert, Button, Group, Text } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import { Icon } from './Icon';

const SAME_ADVICE: Record<string, string> = {
  lease_lost: 'not_found',
  prompt_too_long: 'context_length_exceeded',
  no_such_model: 'model_not_found',
};

const ITSELF = ['network', 'invalid_api_key', 'wrong_password']; // the server's words would add nothing

/** What went wrong in the reader's language, what to do about it, and the server's own words, which are more exact. */
export function ErrorNote({ error, retry }: { error: unknown; retry?: (() => void) | undefined }) {
  const { t, i18n } = useTranslation();
  const message = error instanceof Error ? error.message : String(error);
  const raw = error instanceof ApiError ? error.code : '';
  const code = SAME_ADVICE[raw] ?? raw;
  const known = code !== '' && i18n.exists(`errors.${code}`) && i18n.exists(`errors.${code}_do`);
  const title = known ? t(`errors.${code}` as 'errors.network') : t('errors.title');
  const todo = known ? t(`errors.${code}_do` as 'errors.network_do') : null;
  const exact = ITSELF.includes(code) ? null : message;
  return (
    <Alert color="red" variant="light" title={title} icon={<Icon name="warning" />} role="alert">
      {todo ? <Text size="sm">{todo}</Text> : null}
      {exact ? (
        <Text size="sm" c={todo ? 'dimmed' : 'inherit'} mt={todo ? 4 : 0} lang="en">
          {exact}
        </Text>
      ) : null}
      {retry ? (
        <Group mt="sm">
          <Button size="xs" variant="default" onClick={retry}>
            {t('app.tryAgain')}
          </Button>
        </Group>
      ) : null}
    </Alert>
  );
}
